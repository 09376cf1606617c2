// Package wire is what the host and the virtual machine say to each other:
// a script that the host puts into the initramfs, and events that the guest
// writes, one JSON object a line, to its second serial port. It refuses to
// know how either side is run.
package wire

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Places inside the initramfs that both sides agree on.
const (
	ScriptPath = "/prebake/steps.json"
	ModulesDir = "/prebake/modules"
	OrderPath  = "/prebake/modules/order"
	GPUModule  = "/prebake/emugpu.ko"
)

// Port is the guest's name of the serial port that carries events. On amd64 the
// console is the first port of the same kind; an Arm machine's console is not.
func Port(goarch string) string {
	if goarch == "arm64" {
		return "/dev/ttyS0"
	}
	return "/dev/ttyS1"
}

// Script is what the guest does between boot and power-off.
type Script struct {
	// GPU loads the emulated GPU before the first step.
	GPU bool `json:"gpu,omitempty"`
	// Network starts eth0 before the first step.
	Network bool   `json:"network,omitempty"`
	Steps   []Step `json:"steps"`
}

// Step is one program or built-in to run.
type Step struct {
	Name string   `json:"name"`
	Argv []string `json:"argv"`
	Env  []string `json:"env,omitempty"`
	// TimeoutMS ends the step after so many milliseconds; 0 means never.
	TimeoutMS int64 `json:"timeoutMs,omitempty"`
	// KeepGoing runs the next step even if this one fails.
	KeepGoing bool `json:"keepGoing,omitempty"`
	// Background starts the step and goes on to the next at once.
	Background bool `json:"background,omitempty"`
}

// Type says what an [Event] tells.
type Type string

// The events, in the order in which they may come. Output and End repeat.
const (
	Hello    Type = "hello"  // the guest's init runs
	Ready    Type = "ready"  // kernel modules, network and GPU are up
	Begin    Type = "begin"  // a step starts
	Output   Type = "output" // a step wrote something
	End      Type = "end"    // a step ended
	Fatal    Type = "fatal"  // the guest's init cannot go on
	Finished Type = "bye"    // the script is over; power goes off next
)

// Event is one line from the guest.
type Event struct {
	Type Type `json:"type"`
	// Step is the index in the script; meaningful for begin, output and end.
	Step int `json:"step,omitempty"`
	// Stream is stdout or stderr.
	Stream string `json:"stream,omitempty"`
	Data   []byte `json:"data,omitempty"`
	// Exit is a program's exit status, 128 + signal when it was killed, or the
	// errno of a built-in.
	Exit    int     `json:"exit,omitempty"`
	Seconds float64 `json:"seconds,omitempty"`
	// Error says why; for fatal, and for a step that could not run or end.
	Error string `json:"error,omitempty"`
	// Kernel is what the kernel logged since the last event that had this field.
	Kernel string `json:"kernel,omitempty"`
}

// MaxLine bounds one event; the guest cuts output and kernel log to fit.
const MaxLine = 4 << 20

// MaxChunk bounds the bytes of one output event.
const MaxChunk = 16 << 10

// MaxOutput bounds what one stream of one step may say; the rest is dropped.
const MaxOutput = 4 << 20

// Write sends one event.
func Write(w io.Writer, e Event) error {
	line, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("write event: %w", err)
	}
	if _, err := w.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("write event: %w", err)
	}
	return nil
}

// Read calls f for every event until the stream ends. A last line without its
// newline is what a machine that lost power leaves, and is dropped. Blank
// lines are skipped; anything else that is no event is an error.
func Read(r io.Reader, f func(Event) error) error {
	in := bufio.NewReaderSize(r, 64<<10)
	for {
		line, err := readLine(in)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read event: %w", err)
		}
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			continue
		}
		var e Event
		if err := json.Unmarshal(line, &e); err != nil {
			return fmt.Errorf("read event %.80q: %w", line, err)
		}
		if err := e.check(); err != nil {
			return fmt.Errorf("read event %.80q: %w", line, err)
		}
		if err := f(e); err != nil {
			return err
		}
	}
}

func (e Event) check() error {
	switch e.Type {
	case Hello, Ready, Fatal, Finished:
		return nil
	case Begin, Output, End:
		if e.Step < 0 {
			return fmt.Errorf("step %d: want an index", e.Step)
		}
		if e.Type == Output && e.Stream != "stdout" && e.Stream != "stderr" {
			return fmt.Errorf("stream %q: want stdout or stderr", e.Stream)
		}
		return nil
	}
	return fmt.Errorf("type %q: not in the protocol", e.Type)
}

func readLine(in *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		if len(line)+len(part) > MaxLine {
			return nil, fmt.Errorf("line of more than %d bytes", MaxLine)
		}
		line = append(line, part...)
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return line, nil
	}
}
