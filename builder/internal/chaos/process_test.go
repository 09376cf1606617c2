package chaos_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// process is a program that starts again whenever it ends, as systemd or Kubernetes would start it.
type process struct {
	name string
	make func() *exec.Cmd
	log  *os.File

	mu     sync.Mutex
	wanted bool
	pid    int // of the running program; 0 if none runs
	ended  chan struct{}
}

// restartPause is the pause before a program is started again.
const restartPause = 500 * time.Millisecond

// launch starts a program and keeps it running until retire.
func launch(t *testing.T, dir, name string, command func() *exec.Cmd) *process {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{name: name, make: command, log: log, wanted: true, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		for p.runOnce(t) {
			time.Sleep(restartPause)
		}
	}()
	t.Cleanup(func() {
		p.retire()
		if err := log.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			raw, _ := os.ReadFile(log.Name()) // best effort: the text only helps the reader of a failure
			lines := strings.Split(string(raw), "\n")
			t.Logf("---- the end of %s\n%s", log.Name(), strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	})
	return p
}

// runOnce runs the program until it ends, and reports whether the program must be started again.
func (p *process) runOnce(t *testing.T) bool {
	cmd := p.make()
	cmd.Stdout, cmd.Stderr = p.log, p.log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	p.mu.Lock()
	if !p.wanted {
		p.mu.Unlock()
		return false
	}
	err := cmd.Start()
	if err == nil {
		p.pid = cmd.Process.Pid
	}
	p.mu.Unlock()
	if err != nil {
		t.Errorf("start %s: %v", p.name, err)
		return false
	}
	_ = cmd.Wait() // the program was killed, so its exit status has no meaning
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pid = 0
	return p.wanted
}

// signal sends a signal to the running program and returns its process id, or 0 if none runs.
func (p *process) signal(s syscall.Signal) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pid == 0 || syscall.Kill(p.pid, s) != nil {
		return 0
	}
	return p.pid
}

// retire kills the program, waits for its end and does not start it again. It returns the process id.
func (p *process) retire() int {
	p.mu.Lock()
	p.wanted = false
	p.mu.Unlock()
	pid := p.signal(syscall.SIGKILL)
	<-p.ended
	return pid
}

// smallDisk mounts a tmpfs of the given size in MiB on dir, so that the test can fill it, and returns true. Only root
// may mount. For other users, dir stays a plain folder, and smallDisk returns false.
func smallDisk(t *testing.T, dir, size string) (full bool) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() != 0 {
		return false
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size+"m,mode=755"); err != nil {
		t.Fatalf("mount a small file system on %s: %v", dir, err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return true
}

// fill takes all free space of a small disk for the duration d.
func fill(t *testing.T, dir string, d time.Duration) {
	t.Helper()
	name := filepath.Join(dir, "ballast")
	f, err := os.Create(name)
	if err != nil && !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if err == nil {
		for _, size := range []int{1 << 20, 4 << 10} {
			for err = error(nil); err == nil; {
				_, err = f.Write(make([]byte, size))
			}
			if !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("fill %s: %v", dir, err)
			}
		}
		if err := f.Close(); err != nil && !errors.Is(err, syscall.ENOSPC) {
			t.Error(err)
		}
	}
	time.Sleep(d)
	if err := os.Remove(name); err != nil {
		t.Error(err)
	}
}
