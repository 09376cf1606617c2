package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/vm/internal/wire"
)

const (
	// exitUnrunnable is a shell's exit status for a program that cannot start.
	exitUnrunnable = 127
	// exitTimeout is the exit status of timeout(1) for a program that exceeds its limit.
	exitTimeout = 124
	// stopGrace is how long a background step may take to end after SIGTERM.
	stopGrace = 10 * time.Second
	// defaultPath is the PATH of steps that do not set their own.
	defaultPath = "PATH=/usr/local/nvidia/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// runner runs a script's steps one after the other.
type runner struct {
	host     *link
	builtins map[string]builtin
	// background has the background steps that still run, by name.
	background map[string]*job
}

// job is one started program.
type job struct {
	step  int
	cmd   *exec.Cmd
	start time.Time
	done  chan struct{} // closed when the program has ended
	exit  int           // valid after done is closed
}

// run runs the steps until one without KeepGoing fails. Then it stops the background steps that still run.
func (r *runner) run(steps []wire.Step) {
	r.background = map[string]*job{}
	for i, s := range steps {
		if exit := r.step(i, s); exit != 0 && !s.KeepGoing {
			break
		}
	}
	for _, s := range steps { // in the script's order
		if _, ok := r.background[s.Name]; ok {
			_, _ = r.stop(s.Name)
		}
	}
}

// step runs one step and returns its exit status.
func (r *runner) step(i int, s wire.Step) int {
	r.host.send(wire.Event{Type: wire.Begin, Step: i})
	start := time.Now()
	end := func(exit int, text string) int {
		r.host.send(wire.Event{Type: wire.End, Step: i, Exit: exit, Error: text,
			Seconds: time.Since(start).Seconds(), Kernel: r.host.kernel()})
		return exit
	}
	if len(s.Argv) == 0 || s.Argv[0] == "" {
		return end(exitUnrunnable, "the step names no program")
	}
	timeout := time.Duration(s.TimeoutMS) * time.Millisecond
	if s.Argv[0][0] == '@' {
		exit, err := r.builtin(i, s.Argv, timeout)
		return end(exit, errText(err))
	}
	j, err := r.start(i, s)
	if err != nil {
		return end(exitUnrunnable, err.Error())
	}
	if s.Background {
		r.background[s.Name] = j
		return 0
	}
	select {
	case <-j.done:
		return end(j.exit, "")
	case <-timeoutChannel(timeout):
		j.signal(unix.SIGKILL)
		<-j.done
		return end(exitTimeout, fmt.Sprintf("killed after %v", timeout))
	}
}

// builtin runs a built-in. A built-in that blocks in the kernel cannot be killed: after its time limit the script
// continues, and the goroutine stays.
func (r *runner) builtin(i int, argv []string, timeout time.Duration) (int, error) {
	stdout := &output{host: r.host, step: i, stream: "stdout"}
	f, ok := r.builtins[argv[0]]
	if !ok {
		if argv[0] != "@stop" {
			return exitUnrunnable, fmt.Errorf("there is no built-in command %s", argv[0])
		}
		if len(argv) != 2 {
			return int(unix.EINVAL), errors.New("stop: want the name of a background step")
		}
		return r.stop(argv[1])
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	result := make(chan error, 1)
	go func() { result <- f(ctx, argv[1:], stdout) }()
	select {
	case err := <-result:
		return exitOf(err), err
	case <-timeoutChannel(timeout):
		return exitTimeout, fmt.Errorf("the command %s did not end within %v", argv[0], timeout)
	}
}

func (r *runner) start(i int, s wire.Step) (*job, error) {
	cmd := exec.Command(s.Argv[0], s.Argv[1:]...)
	cmd.Env = append([]string{defaultPath, "HOME=/root", "TERM=dumb"}, s.Env...)
	cmd.Stdout = &output{host: r.host, step: i, stream: "stdout"}
	cmd.Stderr = &output{host: r.host, step: i, stream: "stderr"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = time.Second
	j := &job{step: i, cmd: cmd, start: time.Now(), done: make(chan struct{})}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(j.done)
		j.exit = exitStatus(cmd.Wait())
	}()
	return j, nil
}

// stop sends SIGTERM to a background step, reports the step's end, and returns its exit status.
func (r *runner) stop(name string) (int, error) {
	j, ok := r.background[name]
	if !ok {
		return int(unix.ESRCH), fmt.Errorf("stop %q: there is no such background step", name)
	}
	delete(r.background, name)
	j.signal(unix.SIGTERM)
	text := ""
	select {
	case <-j.done:
	case <-time.After(stopGrace):
		j.signal(unix.SIGKILL)
		<-j.done
		text = fmt.Sprintf("killed, because it did not end within %v after SIGTERM", stopGrace)
	}
	r.host.send(wire.Event{Type: wire.End, Step: j.step, Exit: j.exit, Error: text,
		Seconds: time.Since(j.start).Seconds()})
	return j.exit, nil
}

// signal sends a signal to the program's process group.
func (j *job) signal(sig unix.Signal) {
	if err := unix.Kill(-j.cmd.Process.Pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
		fmt.Fprintf(os.Stderr, "guestinit: signal %s: %v\n", j.cmd.Path, err)
	}
}

// exitStatus returns the exit status that a shell would show for the end of a program.
func exitStatus(err error) int {
	var ee *exec.ExitError
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		return 0
	case errors.As(err, &ee):
		if ws, ok := ee.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return 128 + int(ws.Signal())
		}
		return ee.ExitCode()
	}
	return exitUnrunnable
}

// exitOf returns the exit status of a built-in: 0, the errno in the error, or 1 if there is none.
func exitOf(err error) int {
	var errno unix.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &errno):
		return int(errno)
	}
	return 1
}

// timeoutChannel returns a channel that fires after d. If d is 0, the channel never fires.
func timeoutChannel(d time.Duration) <-chan time.Time {
	if d <= 0 {
		return nil
	}
	return time.After(d)
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
