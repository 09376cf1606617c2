package gpucheck

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
)

// Prober runs the probe program nvmlprobe, one process at a time.
type Prober struct {
	// Program is the probe's path in the fetcher's own root.
	Program string
	// Node is the node's root. If its folder is not "/", Prober runs a copy of the program there, with the node's
	// libraries.
	Node *noderoot.Root
	// Copy is a path inside the node's root.
	Copy string
	// ReadOnly forbids to write the copy. If the copy is missing, Probe then returns an error.
	ReadOnly bool

	mu      sync.Mutex
	since   time.Time // when the running probe started; zero if none runs
	running string    // the library that the running probe asks: NVML or CUDA
}

// ErrHung is the error of a probe that did not answer in time.
var ErrHung = errors.New("no answer")

var errNotThere = errors.New("run nvmlprobe: it was not copied to this node yet")

// probeTime is the longest time of one probe. On large machines, NVML's first call takes some seconds for each GPU.
const probeTime = 2 * time.Minute

// killTime is how long the prober waits for a killed probe. A probe that sleeps inside the driver (state D of ps) never
// ends.
const killTime = 10 * time.Second

// maxAnswer is the maximum output of the probe in bytes. A machine has at most 16 GPUs.
const maxAnswer = 1 << 20

// Probe asks an NVML library: a path inside the node's root, or a name for the dynamic loader. If persist is true, it
// turns persistence mode on. NVML's failures are part of the answer; an error means that the probe did not run or end.
// A stuck probe does not block Probe, but later calls fail until it ends.
func (p *Prober) Probe(ctx context.Context, library string, persist bool) (NVML, error) {
	args := []string{"--lib", library}
	if persist {
		args = append(args, "--persist")
	}
	stdout, stderr, err := p.run(ctx, "NVML", library, nil, args...)
	if err != nil && stdout == nil {
		return NVML{}, err
	}
	return parseAnswer(stdout, stderr, err)
}

// run runs the probe for a library: name is NVML or CUDA, and library its path or file name. The probe gets the
// variables env, and LD_LIBRARY_PATH with the folder of a library with an absolute path. If the probe could not be
// copied or did not end, stdout is nil. Otherwise err is the result of [exec.Cmd.Run].
func (p *Prober) run(ctx context.Context, name, library string, env []string, args ...string) (stdout []byte,
	stderr string, err error) {
	p.mu.Lock()
	if !p.since.IsZero() {
		since, running := p.since, p.running
		p.mu.Unlock()
		return nil, "", hung(running, time.Since(since))
	}
	p.since, p.running = time.Now(), name
	p.mu.Unlock()
	type outcome struct {
		stdout []byte
		stderr string
		err    error
	}
	answered := make(chan outcome, 1)
	ctx, cancel := context.WithTimeoutCause(ctx, probeTime, hung(name, probeTime))
	go func() {
		defer cancel()
		var o outcome
		o.stdout, o.stderr, o.err = p.start(ctx, library, env, args...)
		p.mu.Lock()
		p.since = time.Time{}
		p.mu.Unlock()
		answered <- o
	}()
	select {
	case o := <-answered:
		return o.stdout, o.stderr, o.err
	case <-ctx.Done():
	}
	select {
	case o := <-answered:
		return o.stdout, o.stderr, o.err
	case <-time.After(killTime):
		return nil, "", context.Cause(ctx)
	}
}

// hung returns the error of a probe that has asked a library, NVML or CUDA, for the time d.
func hung(library string, d time.Duration) error {
	return fault.Wrap(fault.Unusable, fmt.Errorf("ask %s: %w in %s", library, ErrHung, d.Round(time.Second)),
		"read the kernel log: dmesg | grep NVRM")
}

// start starts the probe and waits for its end. The results are those of run.
func (p *Prober) start(ctx context.Context, library string, env []string, args ...string) (stdout []byte, stderr string,
	err error) {
	program := p.Program
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if p.Node.Dir() != "/" {
		if err := p.ensureCopy(); err != nil {
			return nil, "", err
		}
		program, attr.Chroot = p.Copy, p.Node.Dir()
	}
	for try := 1; ; try++ {
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Path, cmd.Err = program, nil // exec looked for the program in the fetcher's root: ignore its result
		cmd.Dir, cmd.SysProcAttr, cmd.Env = "/", attr, append([]string{}, env...)
		if filepath.IsAbs(library) {
			cmd.Env = append(cmd.Env, "LD_LIBRARY_PATH="+filepath.Dir(library))
		}
		var out, errs limited
		cmd.Stdout, cmd.Stderr = &out, &errs
		cmd.WaitDelay = 5 * time.Second
		err = cmd.Run()
		switch {
		case ctx.Err() != nil:
			return nil, "", context.Cause(ctx)
		case errors.Is(err, syscall.ETXTBSY) && try < busyTries:
			time.Sleep(busyPause)
			continue
		}
		return append([]byte{}, out.Bytes()...), errs.String(), err
	}
}

// The kernel refuses to start a program that a process has open for writing (ETXTBSY). A process that this program
// started at the moment when it wrote the probe's copy has the file open until its own exec (go.dev/issue/22315).
const (
	busyTries = 100
	busyPause = 10 * time.Millisecond
)

// ensureCopy copies the probe into the node's root, unless an identical copy exists.
func (p *Prober) ensureCopy() (err error) {
	want, err := hostfile.Sum(p.Program)
	if err != nil {
		return fault.Wrap(fault.Unusable, fmt.Errorf("read the program nvmlprobe: %w", err),
			"set --probe to the path of the nvmlprobe program")
	}
	folder, err := p.Node.Folder(path.Dir(p.Copy))
	if err == nil {
		defer func() { err = errors.Join(err, folder.Close()) }()
		var have string
		if have, err = sum(folder, path.Base(p.Copy)); err == nil && have == want {
			return nil
		}
	}
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("copy nvmlprobe to the node: %w", err)
	case p.ReadOnly:
		return fault.Wrap(fault.Unusable, errNotThere,
			"run \"fetcher install\" first, or run this command on the node itself with --host-root /")
	case folder == nil:
		return fmt.Errorf("copy nvmlprobe to the node: %w", err)
	}
	tmp := "tmp-probe-" + rand.Text() // another fetcher may copy at the same time
	if err := errors.Join(p.copy(folder, tmp), folder.RemoveAll(tmp)); err != nil {
		return fault.Disk(fmt.Errorf("copy nvmlprobe to the node: %w", err), "make space on the disk of the install folder")
	}
	return nil
}

// copy writes the probe under a temporary name and renames it.
func (p *Prober) copy(folder *os.Root, tmp string) error {
	in, err := os.Open(p.Program)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := folder.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if err := errors.Join(hostfile.Fill(out, in), folder.Chmod(tmp, 0o755)); err != nil { // because the umask applies, too
		return err
	}
	return folder.Rename(tmp, path.Base(p.Copy))
}

// sum returns the SHA-256 of a file, in hex.
func sum(folder *os.Root, name string) (string, error) {
	f, err := folder.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), err
}

// parseAnswer parses the probe's JSON. Without JSON, the probe did not run.
func parseAnswer(stdout []byte, stderr string, runErr error) (NVML, error) {
	var a struct {
		DriverVersion string   `json:"driverVersion"`
		CUDAVersion   string   `json:"cudaVersion"`
		Devices       []Device `json:"devices"`
		Error         string   `json:"error"`
	}
	if err := json.Unmarshal(stdout, &a); err != nil {
		cause := err
		if runErr != nil {
			cause = runErr
		}
		return NVML{}, fault.Wrap(fault.Unusable, fmt.Errorf("ask NVML: %w: %s", cause, Clip(strings.TrimSpace(stderr), 200)),
			"check that --probe is the path of the nvmlprobe program, and that the node has a C library")
	}
	switch {
	case a.Error == "" && runErr != nil:
		a.Error = runErr.Error()
	case a.Error == "" && a.DriverVersion == "":
		a.Error = "the result of nvmlprobe has no driver version"
	}
	return NVML{Version: a.DriverVersion, CUDA: a.CUDAVersion, Devices: a.Devices, Error: a.Error}, nil
}

// limited is a buffer that drops bytes beyond maxAnswer.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if room := maxAnswer - l.Len(); room < len(p) {
		l.Buffer.Write(p[:max(0, room)]) // a Buffer's Write never fails
		return len(p), nil
	}
	return l.Buffer.Write(p)
}
