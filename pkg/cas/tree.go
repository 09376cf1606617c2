package cas

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	ocidigest "github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// treeScheme is hashed first for every tree digest. A change of the way in which digests are computed must also change
// treeScheme, so that no new digest equals an old one.
const treeScheme = "prebake tree 1\n"

// maxWorkers is the maximum number of files that are hashed in parallel.
const maxWorkers = 8

type treeEntry struct {
	path string // slash-separated path below the tree
	kind byte   // f: file, x: executable file, l: symbolic link
	sum  [sha256.Size]byte
}

// DigestTree returns a digest of the folder's content. For each file and symbolic link, in the order of the paths, it
// covers path, kind, executable bit, and content or target. It does not cover times, owners, other mode bits and empty
// folders. If skip is not nil, DigestTree passes each slash-separated path to skip, and leaves the entry out if skip
// returns true. An entry that is not a folder, file or symbolic link is an error.
func DigestTree(ctx context.Context, dir string, skip func(path string) bool) (string, error) {
	var entries []treeEntry
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		e := treeEntry{path: filepath.ToSlash(rel)}
		if skip != nil && skip(e.path) {
			return nil
		}
		switch d.Type() {
		case 0:
			e.kind = 'f' // hashFile changes it to x for an executable file
		case fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			e.kind, e.sum = 'l', sha256.Sum256([]byte(target))
		default:
			return fmt.Errorf("%s is neither a folder nor a file nor a link", path)
		}
		entries = append(entries, e)
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("compute the digest of a folder: %w", err)
	}
	slices.SortFunc(entries, func(a, b treeEntry) int { return strings.Compare(a.path, b.path) })
	if err := hashFiles(ctx, dir, entries); err != nil {
		return "", fmt.Errorf("compute the digest of a folder: %w", err)
	}
	h := sha256.New()
	buf := []byte(treeScheme)
	for _, e := range entries {
		buf = append(buf, e.kind)
		buf = binary.AppendUvarint(buf, uint64(len(e.path)))
		buf = append(buf, e.path...)
		buf = append(buf, e.sum[:]...)
		h.Write(buf)
		buf = buf[:0]
	}
	h.Write(buf)
	return ocidigest.NewDigest(ocidigest.SHA256, h).String(), nil
}

// hashFiles sets the content digest and the kind of each entry that is a file.
func hashFiles(ctx context.Context, dir string, entries []treeEntry) error {
	g, ctx := errgroup.WithContext(ctx)
	workers := min(maxWorkers, runtime.GOMAXPROCS(0))
	for w := range workers {
		g.Go(func() error {
			buf := make([]byte, 128<<10)
			for i := w; i < len(entries); i += workers {
				if err := context.Cause(ctx); err != nil {
					return err
				}
				if entries[i].kind == 'l' {
					continue
				}
				if err := hashFile(filepath.Join(dir, filepath.FromSlash(entries[i].path)), &entries[i], buf); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

func hashFile(path string, e *treeEntry, buf []byte) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Mode()&0o111 != 0 {
		e.kind = 'x'
	}
	h := sha256.New()
	if _, err := io.CopyBuffer(h, struct{ io.Reader }{f}, buf); err != nil {
		return err
	}
	h.Sum(e.sum[:0])
	return nil
}

// syncTree makes a tree's content durable. The caller then renames the tree: without syncTree, the rename could survive
// a power cut that destroys the content. One syncfs takes far less time than an fsync for each of thousands of files.
func syncTree(dir string) (err error) {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}
