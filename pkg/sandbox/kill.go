package sandbox

import (
	"errors"
	"syscall"
	"time"

	"github.com/prometheus/procfs"
)

// killWithChildren kills bubblewrap and its child. The kernel then kills everything in the sandbox. If only bubblewrap
// were killed during set-up, the child would wait for ever.
func killWithChildren(pid int) error {
	// A stopped process starts no more children.
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return err
	}
	children := childrenOnceStopped(pid)
	err := syscall.Kill(-pid, syscall.SIGKILL)
	for _, child := range children {
		if kerr := syscall.Kill(child, syscall.SIGKILL); !errors.Is(kerr, syscall.ESRCH) {
			err = errors.Join(err, kerr)
		}
	}
	return err
}

// childrenOnceStopped waits at most 100 ms until a process has stopped, and returns its children.
func childrenOnceStopped(pid int) (children []int) {
	fs, err := procfs.NewFS(procfs.DefaultMountPoint)
	if err != nil {
		return nil
	}
	for end := time.Now().Add(100 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Millisecond) {
		p, err := fs.Proc(pid)
		if err != nil {
			return nil
		}
		if s, err := p.Stat(); err != nil || s.State == "T" || s.State == "Z" {
			break
		}
	}
	all, err := fs.AllProcs()
	if err != nil {
		return nil
	}
	for _, p := range all {
		if s, err := p.Stat(); err == nil && s.PPID == pid {
			children = append(children, p.PID)
		}
	}
	return children
}
