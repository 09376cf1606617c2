// Package testbed runs the whole product on one machine, for the demo and the end-to-end tests: a mirror that looks
// like COS's buckets, a server, a builder that takes builds from the server's queue, and a virtual node. It runs the
// real programs, and imports no package of builder, server or fetcher.
package testbed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
)

// Scene has the folders of a run.
type Scene struct {
	// Bin is the folder with builder, server, fetcher, nvmlprobe, guestinit and mirror.
	Bin string
	// State is the folder that keeps mirror, build cache and packages between runs.
	State string
	// Dir is the folder for the files of one run: server data, keys, logs.
	Dir string
	// Out receives the programs' progress.
	Out io.Writer
}

// New returns a scene. PREBAKE_STATE is the folder of its state; the default is prebake in the user's cache folder.
func New(bin, dir string, out io.Writer) (*Scene, error) {
	state := os.Getenv("PREBAKE_STATE")
	if state == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("find the user's cache folder: %w", err)
		}
		state = filepath.Join(cache, "prebake")
	}
	s := &Scene{Bin: bin, State: state, Dir: dir, Out: out}
	for _, d := range []string{state, dir} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Program returns the path of one of the product's programs.
func (s *Scene) Program(name string) string { return filepath.Join(s.Bin, name) }

// BuildCache returns the builder's cache that the demo and the tests share.
func (s *Scene) BuildCache() string { return filepath.Join(s.State, "build") }

// Result is the result of a program that has ended.
type Result struct {
	Code   int
	Stdout []byte
	Stderr []byte
}

// Run runs a program until it ends. An exit status other than 0 is not an error. The program's stderr also goes to Out.
func (s *Scene) Run(ctx context.Context, name string, args ...string) (*Result, error) {
	cmd := exec.CommandContext(ctx, s.Program(name), args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout = &stdout
	cmd.Stderr = io.MultiWriter(&stderr, s.Out)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	res := &Result{Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && ctx.Err() == nil:
		res.Code = exit.ExitCode()
		return res, nil
	case err != nil:
		return res, fmt.Errorf("run %s: %w", name, err)
	}
	return res, nil
}

// Must runs a program as Run does. It returns the stdout, and an error if the exit status is not 0.
func (s *Scene) Must(ctx context.Context, name string, args ...string) ([]byte, error) {
	res, err := s.Run(ctx, name, args...)
	if err != nil {
		return nil, err
	}
	if res.Code != 0 {
		return nil, fmt.Errorf("run %s %s: exit status %d: %s", name, strings.Join(args, " "), res.Code,
			lastLines(res.Stderr, 5))
	}
	return res.Stdout, nil
}

func lastLines(b []byte, n int) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// Mirror is the output of the mirror command.
type Mirror struct {
	Dir string
	// Made is the number of objects that this run made, and Cached the number that it took from the cache.
	Made   int `json:"made"`
	Cached int `json:"cached"`
	Builds []struct {
		target.Kernel
		// Package is the version of the kernel's Debian packages, such as 6.1.192-2.
		Package string `json:"debianPackageVersion"`
		Note    string `json:"note"`
	} `json:"builds"`
	Drivers []struct {
		Version  string           `json:"version"`
		Flavours []target.Flavour `json:"flavours"`
	} `json:"drivers"`
}

// KernelURL returns the URL of the mirror's bucket of COS builds.
func (m *Mirror) KernelURL() string { return "file://" + filepath.Join(m.Dir, "cos") }

// DriverURL returns the URL of the mirror's bucket of runfiles.
func (m *Mirror) DriverURL() string { return "file://" + filepath.Join(m.Dir, "drivers") }

// Siblings returns the first two kernels that Debian compiled from one upstream version. ok is false if there are none.
func (m *Mirror) Siblings() (older, newer target.Kernel, ok bool) {
	for i, a := range m.Builds {
		for _, b := range m.Builds[i+1:] {
			upstream, _, _ := strings.Cut(a.Package, "-")
			other, _, _ := strings.Cut(b.Package, "-")
			if upstream == other && a.Release != b.Release {
				return a.Kernel, b.Kernel, true
			}
		}
	}
	return target.Kernel{}, target.Kernel{}, false
}

// Mirror makes the mirror of COS's buckets, or completes the one of an earlier run.
func (s *Scene) Mirror(ctx context.Context) (*Mirror, error) {
	m := &Mirror{Dir: filepath.Join(s.State, "mirror")}
	raw, err := s.Must(ctx, "mirror", "--out", m.Dir, "--cache", filepath.Join(s.State, "packages"), "--output", "json")
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, m); err != nil {
		return nil, fmt.Errorf("read the output of the command mirror: %w", err)
	}
	if len(m.Builds) < 3 || len(m.Drivers) < 2 {
		return nil, fmt.Errorf("the mirror has %d COS builds and %d drivers; want at least 3 COS builds and 2 drivers",
			len(m.Builds),
			len(m.Drivers))
	}
	for i := range m.Builds {
		k := &m.Builds[i].Kernel
		commit, err := os.ReadFile(filepath.Join(m.Dir, "cos", k.BuildID, k.Board, "kernel_commit"))
		if err != nil {
			return nil, err
		}
		k.Commit, k.Milestone = strings.TrimSpace(string(commit)), 109
	}
	return m, nil
}

// Process is a running program.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when the program has ended
	err  error         // error of the program; read it only after done is closed
}

// Start starts a program that writes its output to the file log in Dir. The program has its own process group, so
// Ctrl-C at the terminal does not reach it. The caller must stop it.
func (s *Scene) Start(log, name string, args ...string) (*Process, error) {
	out, err := os.OpenFile(filepath.Join(s.Dir, log), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(s.Program(name), args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", name, err), out.Close())
	}
	p := &Process{cmd: cmd, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.err = errors.Join(cmd.Wait(), out.Close())
	}()
	return p, nil
}

// Stop asks the program to end, and kills it after a minute. Server and builder may need 20 seconds for their running
// work.
func (p *Process) Stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return p.err
	case <-time.After(time.Minute):
		return errors.Join(errors.New("stop the program: the program did not end within a minute"), p.Kill())
	}
}

// Kill ends the program with SIGKILL and waits for it.
func (p *Process) Kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.done // the exit status of a killed program says nothing
	return nil
}

// Server is a running server.
type Server struct {
	*Process
	Data   string
	Addr   string // host:port on loopback
	Token  string
	Client *api.Client
}

// StartServer starts a server on a free port and waits until it is ready.
func (s *Scene) StartServer(ctx context.Context, data string, m *Mirror) (*Server, error) {
	if err := os.MkdirAll(data, 0o755); err != nil {
		return nil, err
	}
	addrFile := filepath.Join(data, "address")
	if err := os.Remove(addrFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	p, err := s.Start("server.log", "server", "serve", "--listen", "127.0.0.1:0", "--data", data,
		"--kernel-mirror", m.KernelURL(), "--driver-mirror", m.DriverURL())
	if err != nil {
		return nil, err
	}
	srv := &Server{Process: p, Data: data}
	if err := waitFor(ctx, time.Minute, func() (bool, error) {
		select {
		case <-p.done:
			return false, errors.Join(fmt.Errorf("the server ended; the file %s has its log", filepath.Join(s.Dir,
				"server.log")), p.err)
		default:
		}
		addr, err := os.ReadFile(addrFile)
		if err != nil {
			return false, nil
		}
		token, err := os.ReadFile(filepath.Join(data, "token"))
		srv.Addr, srv.Token = strings.TrimPrefix(strings.TrimSpace(string(addr)), "http://"), strings.TrimSpace(string(token))
		return err == nil && srv.Addr != "", nil
	}); err != nil {
		return nil, errors.Join(fmt.Errorf("wait for the server: %w", err), p.Kill())
	}
	srv.Client = api.NewClient("http://"+srv.Addr, srv.Token, nil)
	return srv, nil
}

// Repository returns the repository for drivers in the server's own registry.
func (srv *Server) Repository() string { return srv.Addr + "/prebake/driver" }

// StartWorker starts a builder that takes builds from the server's queue.
func (s *Scene) StartWorker(srv *Server, m *Mirror, key, cache string, extra ...string) (*Process, error) {
	return s.Start("worker.log", "builder", append([]string{
		"work", "--server", "http://" + srv.Addr, "--token", srv.Token, "--queue",
		"sqlite://" + filepath.Join(srv.Data, "queue.db"),
		"--id", "scene", "--state", filepath.Join(s.Dir, "worker"), "--to", srv.Repository(), "--key", key, "--cache", cache,
		"--kernel-mirror", m.KernelURL(), "--driver-mirror", m.DriverURL(),
	}, extra...)...)
}

// WaitBuild polls a build until it has ended. It calls watch at each change of the build's state or phase; watch may be
// nil.
func WaitBuild(ctx context.Context, c *api.Client, id int64, watch func(api.Build)) (api.Build, error) {
	var last api.Build
	err := waitFor(ctx, time.Hour, func() (bool, error) {
		b, err := c.Build(ctx, id)
		if err != nil {
			return false, err
		}
		if watch != nil && (b.State != last.State || b.Phase != last.Phase) {
			watch(b)
		}
		last = b
		return b.FinishedAt != nil || b.State == api.Published || b.State == api.Failed || b.State == api.Cancelled, nil
	})
	return last, err
}

func waitFor(ctx context.Context, limit time.Duration, ready func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := ready()
		if err != nil || ok {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}
