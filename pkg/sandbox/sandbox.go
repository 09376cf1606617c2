// Package sandbox runs one program behind bubblewrap: without a network, with
// an environment and paths that are the same on every machine, and with
// nothing writable but the folders it was given. It refuses to run a program
// any other way: without bubblewrap or namespaces there is an error, never a
// quiet fallback to the bare host.
//
// What the program sees: the host's /usr read-only (compilers' helpers, make,
// sh), except /usr/local, /usr/src and /usr/lib/modules, which are empty; its
// own /proc, /dev and /tmp; the folders bound by the caller; the host name
// "prebake"; user and group 1000, without capabilities and unable to make
// namespaces of its own. A filter keeps system calls that no build needs from it.
// No home folder, no /etc but what links and the loader need. Memory, processes,
// time, disk space, output and /tmp are bounded; see [Limits] and, for how firmly,
// [SupportedLimits]. /proc/self/mountinfo names the bound folders' paths on the host: the
// kernel has no way to hide them.
package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// Bind shows a host folder inside the sandbox.
type Bind struct {
	// Host is the absolute path of the folder outside.
	Host string
	// Inside is its absolute path in the sandbox.
	Inside string
	// Writable says that the program may change it.
	Writable bool
}

// Config is one run. Argv and Dir are needed.
type Config struct {
	// Argv is the program, found by PATH of Env inside the sandbox, and its arguments.
	Argv []string
	// Env is the whole environment.
	Env map[string]string
	// Dir is the working folder inside the sandbox.
	Dir string
	// Binds are laid over the base in order.
	Binds []Bind
	// Output receives stdout and stderr as one stream; nil drops it.
	Output io.Writer
	// MaxOutput ends a program that prints more bytes; 0 means 256 MiB.
	MaxOutput int64
	// Limits bound what the program takes; the zero value has safe defaults.
	Limits Limits
	// Usage, where not nil, is filled in with what the program took.
	Usage *Usage
}

// Validate reports every problem of the configuration at once.
func (c Config) Validate() error {
	var errs []error
	if len(c.Argv) == 0 {
		errs = append(errs, errors.New("no program"))
	}
	if !strings.HasPrefix(c.Dir, "/") {
		errs = append(errs, fmt.Errorf("working folder %q: want an absolute path", c.Dir))
	}
	for key, value := range c.Env {
		if strings.Contains(key+value, "\x00") {
			errs = append(errs, fmt.Errorf("variable %q: want no zero byte", key))
		}
	}
	for _, b := range c.Binds {
		if strings.Contains(b.Host+b.Inside, "\x00") || !strings.HasPrefix(b.Host, "/") || !strings.HasPrefix(b.Inside, "/") {
			errs = append(errs, fmt.Errorf("bind %q at %q: want absolute paths", b.Host, b.Inside))
		}
	}
	return errors.Join(errs...)
}

// ExitError says that the program ran and ended badly. Its status is that of a
// shell: 128 and a signal number where a signal ended it.
type ExitError struct{ Status int }

func (e *ExitError) Error() string { return fmt.Sprintf("exit status %d", e.Status) }

// Killed reports whether SIGKILL ended the program: with nobody else to send
// it, that is the kernel's out-of-memory killer.
func (e *ExitError) Killed() bool { return e.Status == 128+int(syscall.SIGKILL) }

const (
	hintInstall = "install bubblewrap: apt-get install bubblewrap"
	hintLimits  = "install util-linux: apt-get install util-linux"
	hintOutput  = "read the end of the build's log to see which output repeats"
	hintUserns  = "allow user namespaces: sysctl -w user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1 " +
		"kernel.apparmor_restrict_unprivileged_userns=0 (those that exist); in a container, run it privileged or with a " +
		"seccomp profile that permits unshare"
)

// Run runs the program and waits for it and everything it started. The sandbox
// dies with this process, also by SIGKILL, and when ctx ends. A program that
// ends badly gives an [ExitError]; one that broke a limit, fault.OutOfMemory,
// fault.DiskFull, fault.TimedOut or fault.Internal, whatever its status; a sandbox
// that cannot be made, fault.Usage.
func Run(ctx context.Context, c Config) error {
	if err := c.Validate(); err != nil {
		return fmt.Errorf("run in sandbox: %w", err)
	}
	program := c.Argv[0]
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("run %s: %w", program, context.Cause(ctx))
	}
	bwrap, err := exec.LookPath("bwrap")
	if err != nil {
		return fault.Wrap(fault.Usage, fmt.Errorf("make sandbox: %w", err), hintInstall)
	}
	if _, err := exec.LookPath(prlimit); err != nil {
		return fault.Wrap(fault.Usage, fmt.Errorf("make sandbox: %w", err), hintLimits)
	}
	if c.MaxOutput == 0 {
		c.MaxOutput = maxOutput
	}
	c.Limits = c.Limits.withDefaults()
	disk, err := newDiskWatch(c.Limits, c.Binds)
	if err != nil {
		return fmt.Errorf("run %s: %w", program, err)
	}
	ctx, late := context.WithTimeoutCause(ctx, c.Limits.Time,
		fault.New(fault.TimedOut, fmt.Sprintf("it ran longer than %v", c.Limits.Time), hintTime))
	defer late()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	setup := &outputFilter{next: c.Output, left: c.MaxOutput, tooMuch: func() {
		stop(fault.New(fault.Internal, fmt.Sprintf("it printed more than %d bytes", c.MaxOutput), hintOutput))
	}}
	var watch sync.WaitGroup
	watch.Go(func() { disk.run(ctx, stop) })
	broke, err := c.start(ctx, bwrap, setup)
	cause := context.Cause(ctx) // before the watch is told to end
	stop(nil)
	watch.Wait()
	if c.Usage != nil {
		c.Usage.Disk = disk.grown
	}
	if cause != nil && (err != nil || setup.exceeded()) {
		return fmt.Errorf("run %s: %w", program, cause)
	}
	if err == nil {
		return nil
	}
	if broke != nil {
		return fmt.Errorf("run %s: %w", program, broke)
	}
	if text := setup.text(); text != "" {
		return fault.Wrap(fault.Usage, fmt.Errorf("make sandbox: %s", text), setupHint(text))
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return fmt.Errorf("run %s in sandbox: %w", program, err)
	}
	status := exit.ExitCode()
	if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		status = 128 + int(ws.Signal())
	}
	if status == 128+int(syscall.SIGXFSZ) {
		return fmt.Errorf("run %s: %w", program,
			fault.New(fault.DiskFull, fmt.Sprintf("it wrote a file of more than %d MiB", min(maxFile, c.Limits.Disk)>>20),
				hintOutput))
	}
	return fmt.Errorf("run %s: %w", program, &ExitError{Status: status})
}

// start runs bubblewrap, in a control group where there can be one. broke is
// the limit that the control group says was broken.
func (c Config) start(ctx context.Context, bwrap string, output io.Writer) (broke, err error) {
	g, gerr := newGroup(c.Limits)
	if gerr == nil {
		defer func() {
			if c.Usage != nil {
				c.Usage.PeakMemory = g.peak()
			}
			broke = g.brokenLimit(c.Limits)
			err = errors.Join(err, g.close())
		}()
		started, err := c.exec(ctx, bwrap, output, g)
		if started {
			return nil, err
		}
		// No CLONE_INTO_CGROUP: an old kernel, or a filter of system calls.
	}
	_, err = c.exec(ctx, bwrap, output, nil)
	return nil, err
}

// exec runs bubblewrap in the group, and without one where g is nil.
func (c Config) exec(ctx context.Context, bwrap string, output io.Writer, g *group) (started bool, err error) {
	limit, err := c.Limits.command(g == nil)
	if err != nil {
		return true, fmt.Errorf("make sandbox: %w", err)
	}
	// Through descriptors, since /proc/1/cmdline would tell the program of the
	// host's paths.
	calls, err := filter()
	if err != nil {
		return true, fmt.Errorf("make sandbox: %w", err)
	}
	const first = 3 // of a child's descriptors after stderr
	options := append(arguments(c), "--seccomp", strconv.Itoa(first+1))
	var files []*os.File
	defer func() {
		for _, f := range files {
			_ = f.Close() // memory, and read to its end
		}
	}()
	for _, text := range []string{strings.Join(options, "\x00") + "\x00", string(calls)} {
		f, err := memoryFile(text)
		if err != nil {
			return true, fmt.Errorf("make sandbox: %w", err)
		}
		files = append(files, f)
	}
	cmd := exec.CommandContext(ctx, bwrap, slices.Concat([]string{"--args", strconv.Itoa(first), "--"}, limit, c.Argv)...)
	cmd.ExtraFiles = files
	cmd.Env = []string{} // bubblewrap itself needs nothing of ours
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if g != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(g.dir.Fd())
	}
	cmd.Cancel = func() error { return killWithChildren(cmd.Process.Pid) }
	// Descendants die with the sandbox's first process; the delay only guards
	// against a pipe that outlives it.
	cmd.WaitDelay = 10 * time.Second

	// --die-with-parent follows the thread that forked, not the process: keep
	// that thread until the sandbox has ended.
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		done <- cmd.Run()
	}()
	err = <-done
	return cmd.Process != nil, err
}

// Probe reports whether this machine can run a sandbox at all.
func Probe(ctx context.Context) error {
	return Run(ctx, Config{Argv: []string{"/usr/bin/true"}, Dir: "/"})
}

func setupHint(text string) string {
	for _, word := range []string{"namespace", "uid map", "gid map", "Operation not permitted", "setgroups",
		"Permission denied"} {
		if strings.Contains(text, word) {
			return hintUserns
		}
	}
	return "check that bubblewrap 0.8 or newer is installed and that every bound folder exists: bwrap --version"
}

// arguments are bubblewrap's options.
func arguments(c Config) []string {
	args := []string{
		"--unshare-all", "--unshare-user", "--disable-userns",
		"--uid", "1000", "--gid", "1000", "--hostname", "prebake",
		"--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv",
		"--ro-bind", "/usr", "/usr",
	}
	// On merged-/usr systems these are links, elsewhere folders.
	for _, dir := range []string{"/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"} {
		if to, err := os.Readlink(dir); err == nil {
			args = append(args, "--symlink", to, dir)
		} else if _, err := os.Stat(dir); err == nil {
			args = append(args, "--ro-bind", dir, dir)
		}
	}
	// What a machine's owner put there must not change a build.
	for _, dir := range []string{"/usr/local", "/usr/src", "/usr/lib/modules"} {
		if info, err := os.Lstat(dir); err == nil && info.IsDir() {
			args = append(args, "--tmpfs", dir, "--remount-ro", dir)
		}
	}
	args = append(args,
		"--ro-bind-try", "/etc/alternatives", "/etc/alternatives", // awk is a link through it
		"--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
		"--proc", "/proc", "--dev", "/dev", "--size", strconv.Itoa(maxTmp), "--tmpfs", "/tmp",
	)
	for _, b := range c.Binds {
		flag := "--ro-bind"
		if b.Writable {
			flag = "--bind"
		}
		args = append(args, flag, b.Host, b.Inside)
	}
	args = append(args, "--remount-ro", "/", "--chdir", c.Dir)
	for _, key := range slices.Sorted(maps.Keys(c.Env)) {
		args = append(args, "--setenv", key, c.Env[key])
	}
	return args
}

// memoryFile returns a file that is nowhere but in memory, at its beginning.
func memoryFile(text string) (*os.File, error) {
	// vm.memfd_noexec may want it said that nobody runs the file; kernels before 6.3
	// do not know the word.
	fd, err := unix.MemfdCreate("prebake", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate("prebake", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memory")
	_, err = f.WriteString(text)
	if _, serr := f.Seek(0, io.SeekStart); err != nil || serr != nil {
		return nil, errors.Join(err, serr, f.Close())
	}
	return f, nil
}

// outputFilter passes the program's output on, up to a bound, and keeps the
// first line if it is bubblewrap's own complaint: it prints one, and only one,
// before it gives up.
type outputFilter struct {
	next io.Writer

	tooMuch func() // called when left runs out

	mu    sync.Mutex
	left  int64 // bytes that may still come; negative after the flood
	first []byte
	ended bool // the first line is complete
}

const maxFirstLine = 1024

func (s *outputFilter) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		line, _, found := bytes.Cut(p, []byte("\n"))
		s.first = append(s.first, line[:min(len(line), maxFirstLine-len(s.first))]...)
		s.ended = found || len(s.first) == maxFirstLine
	}
	if s.left < 0 {
		return len(p), nil // until the program is gone
	}
	if s.left -= int64(len(p)); s.left < 0 {
		s.tooMuch()
		return len(p), nil
	}
	if s.next == nil {
		return len(p), nil
	}
	return s.next.Write(p)
}

func (s *outputFilter) exceeded() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.left < 0
}

func (s *outputFilter) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if text, ok := strings.CutPrefix(string(s.first), "bwrap: "); ok {
		return text
	}
	return ""
}
