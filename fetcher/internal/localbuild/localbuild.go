// Package localbuild compiles a driver on the node itself, by running the builder. A key that only this node has signs
// the artifact. That key is trusted only for the node's own artifacts.
package localbuild

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/target"
)

// Builder compiles drivers on this node with the builder program.
type Builder struct {
	// Program is the path of the builder program.
	Program string
	// Image is a container image with the builder. If it is nil, Program is used.
	Image *Image
	// StateDir is the folder for the node's key and its artifacts.
	StateDir string
	// CacheDir is the folder of the builder's cache.
	CacheDir string
	// KernelMirror and DriverMirror are the sources of the inputs, or "" for the builder's defaults.
	KernelMirror, DriverMirror string
	// Retry compiles again even after a recent failure.
	Retry bool
	// Progress receives the builder's progress lines. It may be nil.
	Progress func(line string)

	root string // the root folder of the unpacked image
}

// grace is how long a builder may clean up after SIGTERM.
const grace = 30 * time.Second

// Layout returns the reference of the OCI layout with the node's own artifacts.
func (b Builder) Layout() string { return "oci:" + filepath.Join(b.StateDir, "local") }

// PublicKey returns the public half of the node's key in this state folder.
func PublicKey(stateDir string) ([]byte, error) {
	pem, err := os.ReadFile(keyIn(stateDir) + ".pub")
	if err != nil {
		return nil, fault.Wrap(fault.Unverified, fmt.Errorf("read this node's signing key: %w", err),
			"without the key of this node, no driver that it compiled can be verified: publish the driver, or compile it "+
				"again: fetcher install")
	}
	return pem, nil
}

// Both halves of the node's key are in one folder. The folder gets its final name only when both exist, so a killed run
// leaves neither a single half nor halves of two pairs.
const (
	keyFolder = "node-key"
	keyFile   = "local.key"
)

// keyIn returns the path of the node's private key. Older releases stored it in the state folder itself.
func keyIn(stateDir string) string {
	key := filepath.Join(stateDir, keyFolder, keyFile)
	old := filepath.Join(stateDir, keyFile)
	if _, err := os.Stat(filepath.Dir(key)); errors.Is(err, os.ErrNotExist) && completePEM(old) &&
		completePEM(old+".pub") {
		return old
	}
	return key
}

// key returns the path of the node's key. If there is no complete pair, key makes a new one.
func (b Builder) key(ctx context.Context) (_ string, err error) {
	if key := keyIn(b.StateDir); completePEM(key) && completePEM(key+".pub") {
		return key, nil
	}
	fresh, folder := filepath.Join(b.StateDir, "tmp-key"), filepath.Join(b.StateDir, keyFolder)
	defer func() {
		if err != nil { // the record of a full disk may need the space of an incomplete key
			full := fault.NoSpace(err) || fault.Is(err, fault.DiskFull)
			err = fmt.Errorf("make this node's signing key: %w", errors.Join(err, os.RemoveAll(fresh)))
			if full {
				err = fault.Wrap(fault.DiskFull, err, "make space on the disk of "+b.StateDir)
			}
		}
	}()
	if err := errors.Join(os.RemoveAll(fresh), os.RemoveAll(folder)); err != nil {
		return "", err
	}
	if err := os.Mkdir(fresh, 0o700); err != nil {
		return "", err
	}
	if _, err := b.run(ctx, "keygen", filepath.Join(fresh, keyFile)); err != nil {
		return "", err
	}
	if err := os.Rename(fresh, folder); err != nil {
		return "", err
	}
	return filepath.Join(folder, keyFile), nil
}

// completePEM reports whether a file exists and begins and ends as a PEM file does.
func completePEM(name string) bool {
	text, err := os.ReadFile(name)
	return err == nil && bytes.HasPrefix(text, []byte("-----BEGIN ")) &&
		bytes.HasSuffix(bytes.TrimSpace(text), []byte("-----"))
}

// Build compiles the driver and returns the artifact in the node's own layout. Call release as soon as the artifact is
// staged, or is not needed: until then, no other fetcher compiles on this node, because its compile would remove the
// artifact. An error has the kind of the builder's exit code. With an error, release is nil.
func (b Builder) Build(ctx context.Context, q resolve.Question) (answer resolve.Answer, release func() error,
	err error) {
	if err := os.MkdirAll(b.StateDir, 0o700); err != nil {
		return resolve.Answer{}, nil, fmt.Errorf("make state folder: %w", err)
	}
	if err := b.resolveLinks(); err != nil {
		return resolve.Answer{}, nil, err
	}
	if err := b.failures().lastError(q); err != nil && !b.Retry {
		return resolve.Answer{}, nil, err
	}
	unlock, err := lockCompiles(b.StateDir)
	if err != nil {
		return resolve.Answer{}, nil, err
	}
	if answer, err = b.buildLocked(ctx, q); err != nil {
		return resolve.Answer{}, nil, errors.Join(err, unlock())
	}
	return answer, unlock, nil
}

// buildLocked does the work of Build. The caller holds the lock of [lockCompiles].
func (b Builder) buildLocked(ctx context.Context, q resolve.Question) (_ resolve.Answer, err error) {
	failed := b.failures()
	now, last, err := failed.tries(q, b.Retry)
	if err != nil { // before a pull and before anything is removed
		return resolve.Answer{}, err
	}
	begun := false
	defer func() {
		// Record a full disk: otherwise each restart would pull the image again. The image is removed by now, so there may be
		// space for the record.
		if !begun && fault.Is(err, fault.DiskFull) && ctx.Err() == nil {
			err = errors.Join(err, failed.store(q, err, last))
		}
	}()
	if b.Image != nil {
		if b.Progress != nil {
			b.Progress("fetching the builder's image")
		}
		root, program, remove, uerr := b.Image.unpack(ctx, b.StateDir)
		if uerr != nil {
			return resolve.Answer{}, uerr
		}
		defer func() { err = errors.Join(err, remove()) }()
		b.root, b.Program = root, program
	}
	key, err := b.key(ctx)
	if err != nil {
		return resolve.Answer{}, err
	}
	// Artifacts of earlier runs are already in the install folder, or useless.
	if err := os.RemoveAll(strings.TrimPrefix(b.Layout(), "oci:")); err != nil {
		return resolve.Answer{}, fmt.Errorf("empty the node's own image layout: %w", err)
	}
	// Only a compile needs much memory. If this program is killed before, such as during a slow pull, that is no sign of
	// too little.
	if err := failed.begin(now); err != nil {
		return resolve.Answer{}, err
	}
	begun = true
	answer, err := b.compile(ctx, q, key)
	var serr error
	if ctx.Err() == nil {
		serr = failed.store(q, err, last) // before end, which removes the file whose space this takes
	}
	eerr := failed.end(last, err)
	if err != nil {
		return answer, errors.Join(err, serr, eerr)
	}
	_ = failed.forget(q) // an error here, or in end, must not cost the node a compiled driver
	return answer, nil
}

// compile runs the builder. This step takes the most time, so buildLocked stores its errors.
func (b Builder) compile(ctx context.Context, q resolve.Question, key string) (resolve.Answer, error) {
	flavour := q.Flavour
	if flavour == resolve.Auto {
		flavour = string(target.Proprietary) // every release that compiles on an old kernel has this flavour
	}
	args := []string{
		"build", "--build-id", q.Kernel.BuildID, "--board", q.Kernel.Board, "--driver", string(q.Wish), "--flavour", flavour,
		"--to", b.Layout(), "--key", key, "--cache", b.CacheDir, "--load-test", "off", "--output", "json",
		"--jobs", strconv.Itoa(jobs(runtime.GOMAXPROCS(0), sandbox.MemoryLimit())),
	}
	if b.KernelMirror != "" {
		args = append(args, "--kernel-mirror", b.KernelMirror)
	}
	if b.DriverMirror != "" {
		args = append(args, "--driver-mirror", b.DriverMirror)
	}
	out, err := b.run(ctx, args...)
	if err != nil {
		return resolve.Answer{}, fmt.Errorf("compile on this node: %w", err)
	}
	var res struct {
		Digest string        `json:"digest"`
		Driver target.Driver `json:"driver"`
	}
	if err := json.Unmarshal(out, &res); err != nil || res.Digest == "" {
		return resolve.Answer{}, fault.New(fault.Internal, "compile on this node: the builder's result has no digest",
			hintBuilder)
	}
	return resolve.Answer{State: api.Published, Source: resolve.SourceNode, Driver: res.Driver, Repository: b.Layout(),
		Digest: res.Digest}, nil
}

// The memory limit of a pod counts for the fetcher and the builder together, and the kernel may kill both. baseMemory
// is the memory of all but the compilers, and jobMemory that of one compiler, in bytes.
const (
	baseMemory = 512 << 20
	jobMemory  = 1 << 30
)

// jobs returns the number of compilers for this many processors and this memory limit in bytes; 0 means no limit. An
// image with the builder has no /sys/fs/cgroup, so the builder itself does not see the limit.
func jobs(processors int, limit int64) int {
	if limit <= 0 {
		return processors
	}
	return int(max(min(int64(processors), (limit-baseMemory)/jobMemory), 1))
}

const hintBuilder = "check that --builder is Prebake's builder, of the same release as the fetcher"

// maxOutput is the maximum size of the builder's result in bytes.
const maxOutput = 4 << 20

// errNotStarted is wrapped in the error of a builder that could not be started.
var errNotStarted = errors.New("run the builder")

// run runs the builder and returns its stdout.
func (b Builder) run(ctx context.Context, args ...string) ([]byte, error) {
	cmd, err := b.command(ctx, args)
	if err != nil {
		return nil, err
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = grace
	var stdout output
	cmd.Stdout = &stdout
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", b.Program, err)
	}
	kills := sandbox.MemoryKills()
	if err := cmd.Start(); err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("%w: %w", errNotStarted, err),
			"set --builder to the path of the builder program, or turn compiling off: --builder never")
	}
	said := b.follow(stderr)
	err = cmd.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if stdout.tooLong { // the builder then ended because nobody read its output
		return nil, fault.New(fault.Internal, "the builder wrote more than 4 MiB of output", hintBuilder)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() < 0 {
		if sandbox.MemoryKills() > kills {
			return nil, outOfMemory("the kernel killed the builder for lack of memory", sandbox.MemoryLimit())
		}
		return nil, fault.Wrap(fault.Transient, fmt.Errorf("run the builder: %w", err),
			"if the node had too little memory, free memory or raise the memory limit of the pod, then run \"fetcher "+
				"install\"; read the kernel log: dmesg | tail")
	}
	if exit != nil {
		err := said.fault(exit.ExitCode())
		if fault.Is(err, fault.OutOfMemory) { // the builder's hint is for its own flags
			err = outOfMemory(err.Error(), sandbox.MemoryLimit())
		}
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("run the builder: %w", err)
	}
	return stdout.buffer.Bytes(), nil
}

// outOfMemory returns an error of kind OutOfMemory. The limit is in bytes; 0 means that there is none, or that it is
// not known.
func outOfMemory(text string, limit int64) error {
	hint := "stop programs on this node to get memory"
	if limit > 0 {
		text = fmt.Sprintf("%s; the memory limit of this process and its pod is %d MiB", text, limit>>20)
		hint = fmt.Sprintf("raise the memory limit of the fetcher's pod (resources.limits.memory: %d MiB, and %d MiB for "+
			"each compiler)", baseMemory>>20, jobMemory>>20)
	}
	return fault.New(fault.OutOfMemory, text,
		hint+", or publish the driver with \"builder build\", or turn compiling off: --builder never")
}

// output is a buffer of at most maxOutput bytes. When Write refuses more, the pipe to the builder is closed.
type output struct {
	buffer  bytes.Buffer // not embedded: its ReadFrom would read without a limit
	tooLong bool
}

// Write implements [io.Writer].
func (o *output) Write(p []byte) (int, error) {
	if o.buffer.Len()+len(p) > maxOutput {
		o.tooLong = true
		return 0, errors.New("the builder wrote more than 4 MiB of output")
	}
	return o.buffer.Write(p)
}

// resolveLinks replaces the paths of b's folders by paths without symbolic links, because the links do not exist in an
// image.
func (b *Builder) resolveLinks() error {
	if b.Image == nil {
		return nil
	}
	if err := os.MkdirAll(b.CacheDir, 0o755); err != nil {
		return fmt.Errorf("make cache folder: %w", err)
	}
	for _, dir := range []*string{&b.StateDir, &b.CacheDir} {
		path, err := filepath.EvalSymlinks(*dir)
		if err != nil {
			return fmt.Errorf("find the real path of a folder for the builder: %w", err)
		}
		*dir = path
	}
	for _, list := range []*string{&b.KernelMirror, &b.DriverMirror} {
		mirrors := strings.Split(*list, ",")
		for i, mirror := range mirrors {
			folder, ok := strings.CutPrefix(mirror, "file://")
			if !ok {
				continue
			}
			path, err := filepath.EvalSymlinks(folder)
			if err != nil {
				return fault.Wrap(fault.Usage, fmt.Errorf("find the real path of a mirror's folder: %w", err),
					"set --kernel-mirror and --driver-mirror to existing folders")
			}
			mirrors[i] = "file://" + path
		}
		*list = strings.Join(mirrors, ",")
	}
	return nil
}

// command returns the command that runs the builder. With an image, this program starts itself first (see [Enter]).
func (b Builder) command(ctx context.Context, args []string) (*exec.Cmd, error) {
	if b.root == "" {
		cmd := exec.CommandContext(ctx, b.Program, args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
		return cmd, nil
	}
	enter := []string{EnterCommand, b.root, b.StateDir, b.CacheDir}
	for _, list := range []string{b.KernelMirror, b.DriverMirror} {
		for mirror := range strings.SplitSeq(list, ",") {
			if folder, ok := strings.CutPrefix(mirror, "file://"); ok {
				enter = append(enter, folder)
			}
		}
	}
	enter = append(append(enter, "--", b.Program), args...)
	cmd := exec.CommandContext(ctx, "/proc/self/exe", enter...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Cloneflags: syscall.CLONE_NEWNS}
	return cmd, nil
}

// messages are the builder's own error and hint lines.
type messages struct{ err, hint string }

// follow reads the builder's stderr. It passes progress lines to b.Progress, and returns the last error and hint.
func (b Builder) follow(r io.Reader) (w messages) {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 4096), 1<<20)
	for lines.Scan() {
		line := lines.Text()
		switch {
		case strings.HasPrefix(line, "error: "):
			w.err = strings.TrimPrefix(line, "error: ")
		case strings.HasPrefix(line, "hint:"):
			w.hint = strings.TrimSpace(strings.TrimPrefix(line, "hint:"))
		case b.Progress != nil:
			b.Progress(line)
		}
	}
	_, _ = io.Copy(io.Discard, r) // a line longer than the buffer must not block the builder
	return w
}

// fault converts the builder's exit status into an error of the same kind.
func (w messages) fault(exit int) error {
	if w.err == "" {
		w.err = fmt.Sprintf("the builder ended with status %d", exit)
	}
	for _, k := range fault.Kinds() {
		if k.ExitCode() == exit {
			return fault.New(k, w.err, w.hint)
		}
	}
	return fault.New(fault.Internal, w.err, w.hint)
}
