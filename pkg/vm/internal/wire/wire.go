// Package wire defines the messages between the host and the virtual machine. The host puts a script into the
// initramfs. The guest writes events, one JSON object per line, to its second serial port.
package wire

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Paths in the initramfs that the host and the guest both use.
const (
	ScriptPath = "/prebake/steps.json"
	ModulesDir = "/prebake/modules"
	OrderPath  = "/prebake/modules/order"
	GPUModule  = "/prebake/emugpu.ko"
)

// Port returns the guest's device file of the serial port for events. The console is ttyS0 on amd64. On arm64 it is
// ttyAMA0, a port of another kind.
func Port(goarch string) string {
	if goarch == "arm64" {
		return "/dev/ttyS0"
	}
	return "/dev/ttyS1"
}

// Script says what the guest does between boot and power-off.
type Script struct {
	// GPU makes the guest load the emulated GPU before the first step.
	GPU bool `json:"gpu,omitempty"`
	// Network makes the guest start eth0 before the first step.
	Network bool   `json:"network,omitempty"`
	Steps   []Step `json:"steps"`
}

// Step is one program or built-in to run.
type Step struct {
	Name string   `json:"name"`
	Argv []string `json:"argv"`
	Env  []string `json:"env,omitempty"`
	// TimeoutMS is the time limit of the step in milliseconds; 0 means no limit.
	TimeoutMS int64 `json:"timeoutMs,omitempty"`
	// KeepGoing makes the guest continue with the next step even if this one fails.
	KeepGoing bool `json:"keepGoing,omitempty"`
	// Background makes the guest start the next step at once, while this step still runs.
	Background bool `json:"background,omitempty"`
}

// Type is the kind of an [Event].
type Type string

// Types of events, in the order in which they may come. Begin, Output and End come for each step; Output may repeat.
const (
	Hello    Type = "hello"  // the guest's init runs
	Ready    Type = "ready"  // kernel modules, network and GPU are up
	Begin    Type = "begin"  // a step starts
	Output   Type = "output" // a step wrote something
	End      Type = "end"    // a step ended
	Fatal    Type = "fatal"  // the guest's init cannot continue
	Finished Type = "bye"    // the script is over; power goes off next
)

// Event is one line from the guest.
type Event struct {
	Type Type `json:"type"`
	// Step is the step's index in the script. It is set for Begin, Output and End.
	Step int `json:"step,omitempty"`
	// Stream is stdout or stderr.
	Stream string `json:"stream,omitempty"`
	Data   []byte `json:"data,omitempty"`
	// Exit is a program's exit status, 128 + the signal that killed it, or the errno of a built-in.
	Exit    int     `json:"exit,omitempty"`
	Seconds float64 `json:"seconds,omitempty"`
	// Error is the cause, for Fatal and for a step that could not run or was ended.
	Error string `json:"error,omitempty"`
	// Kernel is the kernel's log since the last event that had this field.
	Kernel string `json:"kernel,omitempty"`
}

// MaxLine is the maximum length of one event in bytes. The guest cuts output and kernel log so that they fit.
const MaxLine = 4 << 20

// MaxChunk is the maximum number of output bytes in one event.
const MaxChunk = 16 << 10

// MaxOutput is the maximum number of bytes of one stream of one step. Further bytes are dropped.
const MaxOutput = 4 << 20

// Write writes one event as one line.
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

// Read passes every event to the callback until the stream ends or the callback returns an error. It skips blank lines.
// It skips a last line without a newline, which a loss of power may leave. Any other line that is not an event is an
// error.
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
			return fmt.Errorf("step %d: want 0 or more", e.Step)
		}
		if e.Type == Output && e.Stream != "stdout" && e.Stream != "stderr" {
			return fmt.Errorf("stream %q: want stdout or stderr", e.Stream)
		}
		return nil
	}
	return fmt.Errorf("the protocol has no event of type %q", e.Type)
}

func readLine(in *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		if len(line)+len(part) > MaxLine {
			return nil, fmt.Errorf("the line has more than %d bytes", MaxLine)
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
