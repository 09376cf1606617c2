// Package ldcache lets the programs of a node find a driver's libraries: the folder is
// named once in the node's /etc/ld.so.conf, and the node's own ldconfig writes the cache
// anew. It refuses to write that cache by itself.
package ldcache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"strings"
	"syscall"
	"time"

	"github.com/prebake/prebake/fetcher/internal/noderoot"
)

const config = "etc/ld.so.conf"

// programs are where a node has ldconfig.
var programs = []string{"/sbin/ldconfig", "/usr/sbin/ldconfig"}

// patience bounds ldconfig, which has been seen to hang on some filesystems
// (container-engine-accelerators, issues 57, 71 and 80).
const patience = time.Minute

// maxConfig bounds the file; a real one has a line or two.
const maxConfig = 1 << 20

// ErrNone is that a node has no ldconfig: then no program of it uses such a cache.
var ErrNone = errors.New("the node has no ldconfig")

// Add names a folder, and has the cache written anew. It reports whether the folder was
// not named before.
func Add(ctx context.Context, node *noderoot.Root, folder string) (added bool, err error) {
	err = change(ctx, node, func(lines []string) []string {
		for _, line := range lines {
			if strings.TrimSpace(line) == folder {
				return lines
			}
		}
		added = true
		return append(lines, folder)
	})
	return added, err
}

// Refresh has the cache written anew.
func Refresh(ctx context.Context, node *noderoot.Root) error {
	return change(ctx, node, func(lines []string) []string { return lines })
}

// Remove takes the folder out again, if [Add] named it. Each line of that name goes: other
// installers write one at each run.
func Remove(ctx context.Context, node *noderoot.Root, folder string) error {
	return change(ctx, node, func(lines []string) []string {
		var rest []string
		for _, line := range lines {
			if strings.TrimSpace(line) != folder {
				rest = append(rest, line)
			}
		}
		return rest
	})
}

func change(ctx context.Context, node *noderoot.Root, edit func([]string) []string) error {
	program := ""
	for _, p := range programs {
		if program == "" && node.Exists(p) {
			program = p
		}
	}
	if program == "" {
		return ErrNone
	}
	have, err := read(node)
	if err != nil {
		return fmt.Errorf("read %s: %w", config, err)
	}
	var lines []string
	if text := strings.TrimSuffix(string(have), "\n"); text != "" {
		lines = strings.Split(text, "\n")
	}
	want := ""
	if lines = edit(lines); len(lines) > 0 {
		want = strings.Join(lines, "\n") + "\n"
	}
	if want != string(have) {
		if err := write(node, []byte(want)); err != nil {
			return fmt.Errorf("write %s: %w", config, err)
		}
	}
	return refresh(ctx, node, program)
}

func read(node *noderoot.Root) ([]byte, error) {
	f, err := node.OpenFile(config, os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(raw) > maxConfig {
		err = fmt.Errorf("it has more than %d bytes", maxConfig)
	}
	return raw, err
}

// write replaces the file in one step.
func write(node *noderoot.Root, text []byte) error {
	etc, err := node.Folder(path.Dir(config))
	if err != nil {
		return err
	}
	defer etc.Close()
	const tmp = ".prebake-ld.so.conf"
	err = etc.WriteFile(tmp, text, 0o644)
	if err == nil {
		err = etc.Rename(tmp, path.Base(config))
	}
	if err != nil {
		return errors.Join(err, etc.RemoveAll(tmp))
	}
	return nil
}

// refresh runs the node's ldconfig on the node's root. It replaces the cache in one step.
func refresh(ctx context.Context, node *noderoot.Root, program string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program)
	cmd.Path, cmd.Err = program, nil // it was looked for on the node
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if node.Dir() != "/" {
		attr.Chroot = node.Dir()
	}
	var said bytes.Buffer
	cmd.Dir, cmd.SysProcAttr, cmd.Env, cmd.Stderr = "/", attr, []string{}, &said
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		text := said.String()
		return fmt.Errorf("run the node's ldconfig: %w: %s", err, strings.TrimSpace(text[:min(len(text), 500)]))
	}
	return nil
}
