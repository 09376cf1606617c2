package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/vm/internal/wire"
)

// maxConsole is the number of bytes at the console's end that are kept. They show why the machine ended.
const maxConsole = 4 << 20

// Run boots the machine, runs its steps and waits for its end. A failed step is not an error of Run: the result has its
// exit code. If the guest's kernel crashes, the error is a [*CrashError], and the result has everything received
// before.
func Run(ctx context.Context, c Config) (*Result, error) {
	c = c.WithDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	own, err := bootArgs(c.Boot)
	if err != nil {
		return nil, err
	}
	// The caller's arguments come last. If an argument is given twice, a kernel uses the later one.
	c.KernelArgs = slices.Concat(own, c.KernelArgs)
	initrd, size, err := stageInitramfs(c)
	if err != nil {
		return nil, err
	}
	defer func() { _ = initrd.Close() }()
	ctx, cancel := context.WithTimeoutCause(ctx, c.Timeout, errOverran)
	defer cancel()

	m, err := start(ctx, c, initrd)
	if err != nil {
		return nil, err
	}
	console := &tail{max: maxConsole}
	seen := &recorder{config: c, start: m.start}
	var readers errgroup.Group
	readers.Go(func() error { return copyConsole(m.console, console, c.Console) })
	readers.Go(func() error {
		err := wire.Read(m.events, seen.event)
		if err != nil {
			cancel() // after an invalid event, the rest of the stream is useless
			_, _ = io.Copy(io.Discard, m.events)
		}
		return err
	})
	exit := m.wait()
	protocol := errors.Join(readers.Wait(), m.close())
	res := seen.result()
	res.Seconds = time.Since(m.start).Seconds()
	res.InitramfsBytes, res.Machine = size, c.describe(ctx)
	return res, verdict(ctx, c, res, seen,
		ends{console: console.String(), exit: exit, protocol: protocol, stderr: m.stderr.String()})
}

var errOverran = errors.New("the machine ran past its time limit")

// ends has what is known about the end of a run.
type ends struct {
	console  string
	exit     error
	protocol error
	stderr   string
}

// verdict returns the best explanation why a run failed, or nil.
func verdict(ctx context.Context, c Config, res *Result, seen *recorder, e ends) error {
	if !seen.ended {
		res.KernelLog = e.console
		if res.Crash = crashLine(e.console); res.Crash != "" {
			return &CrashError{Line: res.Crash, Step: seen.runningStep()}
		}
	}
	switch cause := context.Cause(ctx); {
	case seen.ended:
	case errors.Is(cause, errOverran):
		return fault.Wrap(fault.TimedOut, fmt.Errorf("run machine: the machine did not end within %v (%s)", c.Timeout,
			seen.place()),
			"read the end of the machine's kernel log to see what the machine waits for")
	case e.protocol != nil:
		return fmt.Errorf("run machine: %w", e.protocol)
	case cause != nil:
		return fmt.Errorf("run machine: %w", cause)
	case e.exit != nil:
		return fmt.Errorf("run %s: %w: %s", c.QEMU, e.exit, lastLine(e.stderr, "it printed nothing"))
	case seen.fatal != "":
		return fmt.Errorf("start machine: %s", seen.fatal)
	default:
		return fmt.Errorf("run machine: the machine switched itself off too early (%s); the console ends in %q", seen.place(),
			lastLine(e.console, ""))
	}
	return nil
}

func lastLine(text, none string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if last := strings.TrimSpace(lines[len(lines)-1]); last != "" {
		return last
	}
	return none
}

// stageInitramfs writes the initramfs to an unnamed file, which disappears even if this process is killed. size is in
// bytes.
func stageInitramfs(c Config) (_ *os.File, size int64, err error) {
	f, err := os.CreateTemp("", "prebake-initramfs-")
	if err != nil {
		return nil, 0, fmt.Errorf("write initramfs: %w", err)
	}
	defer func() {
		err = fault.TempDisk(err)
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if err := os.Remove(f.Name()); err != nil {
		return nil, 0, fmt.Errorf("write initramfs: %w", err)
	}
	w := &counter{w: f}
	buffered := newBuffered(w)
	if err := writeInitramfs(buffered, c); err != nil {
		return nil, 0, err
	}
	if err := buffered.Flush(); err != nil {
		return nil, 0, fmt.Errorf("write initramfs: %w", err)
	}
	if limit := int64(c.MemoryMiB) << 20 / 3; w.n > limit {
		return nil, 0, fault.New(fault.Usage,
			fmt.Sprintf("write initramfs: %d MiB of files do not fit into %d MiB of memory", w.n>>20, c.MemoryMiB),
			fmt.Sprintf("give the machine at least %d MiB of memory", 3*w.n>>20+1))
	}
	return f, w.n, nil
}

// recorder turns events into step results.
type recorder struct {
	config Config
	start  time.Time
	steps  []StepResult
	index  map[int]int // from the step's index in the script to its index in steps
	log    strings.Builder
	ready  float64
	last   int // index in steps of the step that began last; meaningless while steps is empty
	fatal  string
	ended  bool // the guest sent Finished
}

func (r *recorder) event(e wire.Event) error {
	r.log.WriteString(e.Kernel)
	switch e.Type {
	case wire.Ready:
		r.ready = time.Since(r.start).Seconds()
		r.watch(Progress{State: "ready", Seconds: r.ready})
	case wire.Begin:
		if e.Step >= len(r.config.Steps) {
			return fmt.Errorf("read event: there is no step with index %d; the script has %d steps", e.Step, len(r.config.Steps))
		}
		if r.index == nil {
			r.index = map[int]int{}
		}
		r.index[e.Step] = len(r.steps)
		r.last = len(r.steps)
		name := r.config.Steps[e.Step].Name
		r.steps = append(r.steps, StepResult{Name: name})
		r.watch(Progress{State: "begin", Step: name})
	case wire.Output, wire.End:
		i, ok := r.index[e.Step]
		if !ok {
			return fmt.Errorf("read event: an event of type %s is about step %d, which did not begin", e.Type, e.Step)
		}
		r.about(&r.steps[i], e)
	case wire.Fatal:
		r.fatal = e.Error
	case wire.Finished:
		r.ended = true
	}
	return nil
}

func (r *recorder) about(s *StepResult, e wire.Event) {
	if e.Type == wire.End {
		s.Ended, s.ExitCode, s.Error, s.Seconds, s.KernelLog = true, e.Exit, e.Error, e.Seconds, e.Kernel
		r.watch(Progress{State: "end", Step: s.Name, ExitCode: e.Exit, Seconds: e.Seconds})
		return
	}
	kept := &s.Stdout
	if e.Stream == "stderr" {
		kept = &s.Stderr
	}
	if len(*kept) < wire.MaxOutput {
		*kept = append(*kept, e.Data...)
	}
	r.watch(Progress{State: "output", Step: s.Name, Stream: e.Stream, Data: e.Data})
}

func (r *recorder) watch(p Progress) {
	if r.config.Watch != nil {
		r.config.Watch(p)
	}
}

func (r *recorder) result() *Result {
	return &Result{Steps: r.steps, KernelLog: r.log.String(), BootSeconds: r.ready}
}

// runningStep returns the name of the step that began last, or "" if that step has ended.
func (r *recorder) runningStep() string {
	if len(r.steps) == 0 || r.steps[r.last].Ended {
		return ""
	}
	return r.steps[r.last].Name
}

func (r *recorder) place() string {
	switch name := r.runningStep(); {
	case name != "":
		return fmt.Sprintf("in step %q", name)
	case r.ready == 0:
		return "while booting"
	case len(r.steps) == 0:
		return "before the first step"
	}
	return fmt.Sprintf("after step %q", r.steps[r.last].Name)
}

// copyConsole keeps the end of the console's text, and writes the whole text to show until show returns an error.
func copyConsole(from io.Reader, keep *tail, show io.Writer) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		keep.write(buf[:n])
		if show != nil && n > 0 {
			if _, werr := show.Write(buf[:n]); werr != nil {
				show = nil
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read console: %w", err)
		}
	}
}

// tail keeps the last bytes of a text: at least max, and at most 2*max.
type tail struct {
	buf bytes.Buffer
	max int
}

func (t *tail) write(p []byte) {
	t.buf.Write(p)
	if t.buf.Len() > 2*t.max {
		t.buf.Next(t.buf.Len() - t.max)
	}
}

// String returns the text without the carriage returns of the serial port.
func (t *tail) String() string { return strings.ReplaceAll(t.buf.String(), "\r", "") }
