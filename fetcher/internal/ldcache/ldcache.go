// Package ldcache makes a driver's libraries available to the programs of a node. It adds the folder to the node's
// /etc/ld.so.conf and runs the node's own ldconfig. It never writes the cache itself.
package ldcache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"github.com/prebake/prebake/fetcher/internal/noderoot"
)

const config = "etc/ld.so.conf"

// timeout is the longest time of a run of ldconfig, which hangs on some file systems (container-engine-accelerators,
// issues 57, 71 and 80).
const timeout = time.Minute

// maxConfig is the maximum size of ld.so.conf in bytes. A real file has a line or two.
const maxConfig = 1 << 20

// ErrNone means that the node has no ldconfig, so no program uses the cache.
var ErrNone = errors.New("the node has no ldconfig")

// Add adds a folder to ld.so.conf and runs ldconfig. Before the change of the file, it calls note, unless the folder is
// already there.
func Add(ctx context.Context, node *noderoot.Root, folder string, note func() error) error {
	var failed error
	err := change(ctx, node, func(lines []string) []string {
		for _, line := range lines {
			if strings.TrimSpace(line) == folder {
				return lines
			}
		}
		if failed = note(); failed != nil {
			return lines
		}
		return append(lines, folder)
	})
	return errors.Join(failed, err)
}

// Refresh lets ldconfig rewrite the cache.
func Refresh(ctx context.Context, node *noderoot.Root) error {
	return change(ctx, node, func(lines []string) []string { return lines })
}

// Remove removes a folder from ld.so.conf and runs ldconfig. It removes each line with this folder, because other
// installers add one at each run. Call it only if [Add] added the folder.
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
	program := node.Program("/sbin/ldconfig", "/usr/sbin/ldconfig")
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
	// With -X, ldconfig makes no links in the folders. It replaces the cache in one step.
	return node.Run(ctx, timeout, program, "-X")
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
		err = fmt.Errorf("the file has more than %d bytes", maxConfig)
	}
	return raw, err
}

func write(node *noderoot.Root, text []byte) error {
	etc, err := node.Folder(path.Dir(config))
	if err != nil {
		return err
	}
	return errors.Join(noderoot.Replace(etc, path.Base(config), ".prebake-ld.so.conf", text), etc.Close())
}
