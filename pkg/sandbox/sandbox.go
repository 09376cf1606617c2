// Package sandbox runs one program in a sandbox that bubblewrap makes. The program has no network. Its environment and
// paths are the same on every machine. It can write only to /tmp and to the folders that the caller gives it. If
// bubblewrap or namespaces are missing, Run returns an error. It never runs the program directly on the host.
//
// The program sees:
//
//   - the host's /usr read-only, for the compilers' helpers, `make` and `sh`
//   - empty folders /usr/local, /usr/src and /usr/lib/modules
//   - its own /proc, /dev and /tmp
//   - the folders that the caller binds
//   - the host name "prebake"
//   - no home folder
//   - from /etc only the folder alternatives, because links in /usr/bin lead there, and the loader's cache
//
// It runs as user and group 1000, without capabilities, and cannot create namespaces. A filter refuses system calls
// that no build needs. Memory, processes, time, disk space, output and /tmp are limited; see [Limits].
// [SupportedLimits] says how strictly this machine enforces the limits.
//
// /proc/self/mountinfo shows the host's paths of the bound folders, because the kernel cannot hide them.
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

// Bind makes a host folder visible inside the sandbox.
type Bind struct {
	// Host is the absolute path of the folder on the host.
	Host string
	// Inside is the absolute path of the folder in the sandbox.
	Inside string
	// Writable allows the program to change the folder.
	Writable bool
}

// Config describes one run. Argv and Dir are required.
type Config struct {
	// Argv is the program and its arguments. The program is looked up in Env's PATH inside the sandbox.
	Argv []string
	// Env is the whole environment of the program.
	Env map[string]string
	// Dir is the working directory inside the sandbox.
	Dir string
	// Binds are mounted in this order, on top of the base system.
	Binds []Bind
	// Output receives stdout and stderr as one stream. Nil discards the output.
	Output io.Writer
	// MaxOutput is the maximum number of output bytes; 0 means 256 MiB. A program that prints more is killed.
	MaxOutput int64
	// Limits bound the program's resources. The zero value has safe defaults.
	Limits Limits
	// Usage receives the resources that the program used. It may be nil.
	Usage *Usage
}

// Validate reports every problem of the configuration at once.
func (c Config) Validate() error {
	var errs []error
	if len(c.Argv) == 0 {
		errs = append(errs, errors.New("no program is given"))
	}
	if !strings.HasPrefix(c.Dir, "/") {
		errs = append(errs, fmt.Errorf("working folder %q: want an absolute path", c.Dir))
	}
	for key, value := range c.Env {
		if strings.Contains(key+value, "\x00") {
			errs = append(errs, fmt.Errorf("environment variable %q: want a text without a zero byte", key))
		}
	}
	for _, b := range c.Binds {
		if strings.Contains(b.Host+b.Inside, "\x00") || !strings.HasPrefix(b.Host, "/") || !strings.HasPrefix(b.Inside, "/") {
			errs = append(errs, fmt.Errorf("mount %q at %q: want absolute paths", b.Host, b.Inside))
		}
	}
	return errors.Join(errs...)
}

// ExitError is the error of a program that ran and failed. Status is the exit status as in a shell: 128 plus the signal
// number if a signal ended the program.
type ExitError struct{ Status int }

func (e *ExitError) Error() string { return fmt.Sprintf("exit status %d", e.Status) }

// Killed reports whether SIGKILL ended the program. The sender is usually the kernel's out-of-memory killer: if Run
// kills the program, Run returns another error.
func (e *ExitError) Killed() bool { return e.Status == 128+int(syscall.SIGKILL) }

const (
	hintInstall = "install bubblewrap: apt-get install bubblewrap"
	hintLimits  = "install util-linux: apt-get install util-linux"
	hintOutput  = "read the end of the build's log to see which output repeats"
	hintFile    = "read the end of the build's log to see which program wrote the file"
	hintUserns  = "in a container, run the container privileged or with a seccomp profile that permits unshare; " +
		"on a host, allow user namespaces; leave out settings that do not exist: sysctl -w " +
		"user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1 " +
		"kernel.apparmor_restrict_unprivileged_userns=0"
)

// Run runs the program, and waits for it and for all processes that it started. The sandbox ends when ctx ends, or when
// this process ends, even by SIGKILL. The errors are:
//
//   - [ExitError] if the program fails
//   - fault.OutOfMemory, fault.DiskFull, fault.TimedOut or fault.Internal if it exceeds a limit, whatever its exit
//     status
//   - fault.Usage if the sandbox cannot be created
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
		fault.New(fault.TimedOut, fmt.Sprintf("the build ran longer than %v", c.Limits.Time), hintTime))
	defer late()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	setup := &outputFilter{next: c.Output, left: c.MaxOutput, tooMuch: func() {
		stop(fault.New(fault.Internal, fmt.Sprintf("the program printed more than %d bytes", c.MaxOutput), hintOutput))
	}}
	var watch sync.WaitGroup
	watch.Go(func() { disk.run(ctx, stop) })
	limitErr, err := c.start(ctx, bwrap, setup)
	cause := context.Cause(ctx) // read before stop(nil) ends the watch
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
	if limitErr != nil {
		return fmt.Errorf("run %s: %w", program, limitErr)
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
			fault.New(fault.DiskFull, fmt.Sprintf("the build wrote a file of more than %d MiB", min(maxFile, c.Limits.Disk)>>20),
				hintFile))
	}
	return fmt.Errorf("run %s: %w", program, &ExitError{Status: status})
}

// start runs bubblewrap, in a control group if one can be created. limitErr says which limit was exceeded, according to
// the control group.
func (c Config) start(ctx context.Context, bwrap string, output io.Writer) (limitErr, err error) {
	g, gerr := newGroup(c.Limits)
	if gerr == nil {
		defer func() {
			if c.Usage != nil {
				c.Usage.PeakMemory = g.peak()
			}
			limitErr = g.brokenLimit(c.Limits)
			err = errors.Join(err, g.close())
		}()
		started, err := c.exec(ctx, bwrap, output, g)
		if started {
			return nil, err
		}
		// An old kernel or a filter of system calls refuses CLONE_INTO_CGROUP. Try again without a control group.
	}
	_, err = c.exec(ctx, bwrap, output, nil)
	return nil, err
}

// exec runs bubblewrap in a control group, or in none if g is nil. If the process could not be created, started is
// false.
func (c Config) exec(ctx context.Context, bwrap string, output io.Writer, g *group) (started bool, err error) {
	limit, err := c.Limits.command(g == nil)
	if err != nil {
		return true, fmt.Errorf("make sandbox: %w", err)
	}
	// Pass the options through file descriptors. Otherwise the program could read the host's paths in /proc/1/cmdline.
	calls, err := seccompFilter()
	if err != nil {
		return true, fmt.Errorf("make sandbox: %w", err)
	}
	const first = 3 // a child's first descriptor after stderr
	options := append(arguments(c), "--seccomp", strconv.Itoa(first+1))
	var files []*os.File
	defer func() {
		for _, f := range files {
			_ = f.Close() // the file is only in memory, so an error does not matter
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
	cmd.Env = []string{} // bubblewrap itself needs no variables; the program gets its own by --setenv
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if g != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(g.dir.Fd())
	}
	cmd.Cancel = func() error { return killWithChildren(cmd.Process.Pid) }
	// The delay is only for a pipe that stays open after the sandbox's first process has ended.
	cmd.WaitDelay = 10 * time.Second

	// With --die-with-parent, the sandbox ends when the thread that forked ends. So this goroutine keeps its thread
	// until the sandbox has ended.
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		done <- cmd.Run()
	}()
	err = <-done
	return cmd.Process != nil, err
}

// Probe returns an error if this machine cannot run a sandbox.
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
	return "check that every bound folder exists, and that bubblewrap has version 0.8 or newer: bwrap --version"
}

func arguments(c Config) []string {
	args := []string{
		"--unshare-all", "--unshare-user", "--disable-userns",
		"--uid", "1000", "--gid", "1000", "--hostname", "prebake",
		"--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv",
		"--ro-bind", "/usr", "/usr",
	}
	// On systems with a merged /usr these paths are links. On other systems they are folders.
	for _, dir := range []string{"/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"} {
		if to, err := os.Readlink(dir); err == nil {
			args = append(args, "--symlink", to, dir)
		} else if _, err := os.Stat(dir); err == nil {
			args = append(args, "--ro-bind", dir, dir)
		}
	}
	// Local files of the machine's owner must not change a build.
	for _, dir := range []string{"/usr/local", "/usr/src", "/usr/lib/modules"} {
		if info, err := os.Lstat(dir); err == nil && info.IsDir() {
			args = append(args, "--tmpfs", dir, "--remount-ro", dir)
		}
	}
	args = append(args,
		"--ro-bind-try", "/etc/alternatives", "/etc/alternatives", // awk is a link into this folder
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

// memoryFile returns a file with this text that exists only in memory. The file's offset is 0.
func memoryFile(text string) (*os.File, error) {
	// The sysctl vm.memfd_noexec may require MFD_NOEXEC_SEAL. Kernels before 6.3 do not know this flag.
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

// outputFilter passes on the program's output up to a bound. It keeps the first line, which may be bubblewrap's error.
type outputFilter struct {
	next io.Writer

	tooMuch func() // called when the bound is exceeded

	mu    sync.Mutex
	left  int64 // bytes that may still be printed; negative if the bound is exceeded
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
		return len(p), nil // discard output until the program has ended
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
