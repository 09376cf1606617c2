package noderoot

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// Program returns the first of the names that exists on the node, or "".
func (r *Root) Program(names ...string) string {
	for _, name := range names {
		if r.Exists(name) {
			return name
		}
	}
	return ""
}

// maxOutput is the maximum size of a program's stored output in bytes.
const maxOutput = 500

// killTime is how long Run waits for a killed program. A program that sleeps in the kernel (state D of ps) never ends.
const killTime = 10 * time.Second

// Run runs a program of the node in the node's root, with an empty environment. The error contains its stderr. Run
// returns at the latest killTime after the limit.
func (r *Root) Run(ctx context.Context, limit time.Duration, program string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Path, cmd.Err = program, nil // exec looked for the program in this root: ignore its result
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if r.dir != "/" {
		attr.Chroot = r.dir
	}
	var said bytes.Buffer
	cmd.Dir, cmd.SysProcAttr, cmd.Env = "/", attr, []string{}
	cmd.Stderr = &first{&said, maxOutput}
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("run the node's %s: %w", program, err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("run the node's %s: %w: %s", program, err, strings.TrimSpace(said.String()))
		}
		return nil
	case <-time.After(limit + killTime):
		return fmt.Errorf("run the node's %s: the program was killed after %v and has not ended", program, limit)
	}
}

// first is a writer that stores only the first bytes.
type first struct {
	w    io.Writer
	left int
}

func (f *first) Write(p []byte) (int, error) {
	n := min(len(p), f.left)
	f.left -= n
	_, err := f.w.Write(p[:n])
	return len(p), err
}
