package mirror

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// epoch is the modification time of all files that the mirror packs. The bytes of an archive must not depend on the
// day.
var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// maxEntry is the largest permitted size of a file of a package, in bytes. NVIDIA's largest file has less than 100 MiB.
const maxEntry = 1 << 30

// node is one file, folder or link of a tree.
type node struct {
	mode fs.FileMode // permission bits
	dir  bool
	link string
	data []byte
	// changed is the modification time of the file in the archive, in seconds since 1970.
	changed int64
}

// tree maps slash-separated relative paths to nodes. Folders need no entry.
type tree map[string]node

// add stores a node. It replaces a node that has the same name, even a link.
func (t tree) add(name string, n node) { t[path.Clean(name)] = n }

func (t tree) addFile(name, text string) { t.add(name, node{mode: 0o644, data: []byte(text)}) }

// paths returns all paths in order, parents before their children. It adds every missing parent folder.
func (t tree) paths() []string {
	all := map[string]bool{}
	for name := range t {
		for p := name; p != "." && p != "/"; p = path.Dir(p) {
			all[p] = true
		}
	}
	names := make([]string, 0, len(all))
	for name := range all {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// writeTar writes the tree as a tar. The bytes depend only on the tree, the prefix before every name, and mtime.
func (t tree) writeTar(w io.Writer, prefix string, mtime time.Time) error {
	tw := tar.NewWriter(w)
	for _, name := range t.paths() {
		n, ok := t[name]
		hdr := &tar.Header{Name: prefix + name, ModTime: mtime, Mode: int64(n.mode.Perm()), Uname: "root", Gname: "root"}
		switch {
		case !ok || n.dir:
			hdr.Typeflag, hdr.Mode, hdr.Name = tar.TypeDir, 0o755, hdr.Name+"/"
		case n.link != "":
			hdr.Typeflag, hdr.Mode, hdr.Linkname = tar.TypeSymlink, 0o777, n.link
		default:
			hdr.Typeflag, hdr.Size = tar.TypeReg, int64(len(n.data))
		}
		if err := tw.WriteHeader(hdr); err != nil {
			return fmt.Errorf("pack %s: %w", name, err)
		}
		if hdr.Typeflag == tar.TypeReg {
			if _, err := tw.Write(n.data); err != nil {
				return fmt.Errorf("pack %s: %w", name, err)
			}
		}
	}
	return tw.Close()
}

// writeTgz writes the tree as a gzip-compressed tar. The gzip header has no name and no time.
func (t tree) writeTgz(w io.Writer, prefix string, mtime time.Time) error {
	zw := gzip.NewWriter(w)
	if err := t.writeTar(zw, prefix, mtime); err != nil {
		return err
	}
	return zw.Close()
}

// writeDir writes the tree to dir, which must exist and be empty.
func (t tree) writeDir(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, name := range t.paths() {
		n, ok := t[name]
		switch {
		case !ok || n.dir:
			if err = root.Mkdir(name, 0o755); err == nil {
				err = root.Chmod(name, 0o755)
			}
		case n.link != "":
			err = root.Symlink(n.link, name)
		default:
			// Chmod makes the mode independent of the umask, which must not change the archive.
			if err = root.WriteFile(name, n.data, 0o600); err == nil {
				err = root.Chmod(name, n.mode)
			}
		}
		if err != nil {
			return fmt.Errorf("lay out %s: %w", name, err)
		}
	}
	return nil
}

// A pick maps the name of a file in an archive to its name in a tree; "" leaves the file out.
type pick func(name string) string

// readDeb adds the selected files of a Debian package to t.
func readDeb(ctx context.Context, t tree, deb string, where pick) error {
	err := pipe(exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb),
		func(r io.Reader) error { return readTar(t, r, where) })
	if err != nil {
		return fmt.Errorf("unpack %s: %w", filepath.Base(deb), err)
	}
	return nil
}

// readXZ adds the selected files of a tar.xz to t.
func readXZ(ctx context.Context, t tree, archive []byte, where pick) error {
	cmd := exec.CommandContext(ctx, "xz", "-dc")
	cmd.Stdin = bytes.NewReader(archive)
	return pipe(cmd, func(r io.Reader) error { return readTar(t, r, where) })
}

// pipe runs cmd and passes its stdout to the callback. It discards the rest of the output, so that cmd can end.
func pipe(cmd *exec.Cmd, read func(io.Reader) error) error {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return commandError(cmd, err, nil)
	}
	readErr := read(out)
	_, drainErr := io.Copy(io.Discard, out)
	if err := cmd.Wait(); err != nil {
		return errors.Join(readErr, commandError(cmd, err, stderr.Bytes()))
	}
	return errors.Join(readErr, drainErr)
}

func readTar(t tree, r io.Reader, where pick) error {
	tr := tar.NewReader(r)
	for {
		hdr, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read tar: %w", err)
		}
		name := where(strings.TrimSuffix(strings.TrimPrefix(path.Clean(hdr.Name), "./"), "/"))
		if name == "" {
			continue
		}
		if !filepath.IsLocal(name) {
			return fmt.Errorf("read tar: the name %q leads out of the tree", hdr.Name)
		}
		n := node{mode: hdr.FileInfo().Mode().Perm(), changed: hdr.ModTime.Unix()}
		switch hdr.Typeflag {
		case tar.TypeDir:
			n.dir = true
		case tar.TypeSymlink:
			n.link = hdr.Linkname
		case tar.TypeReg:
			if hdr.Size > maxEntry {
				return fmt.Errorf("read tar: %s has %d bytes; want at most %d bytes", hdr.Name, hdr.Size, maxEntry)
			}
			n.data = make([]byte, hdr.Size)
			if _, err := io.ReadFull(tr, n.data); err != nil {
				return fmt.Errorf("read tar: %s: %w", hdr.Name, err)
			}
		default:
			return fmt.Errorf("read tar: %s is neither a file nor a folder nor a symbolic link", hdr.Name)
		}
		t.add(name, n)
	}
}

// pickFolder returns a pick that moves everything below one folder to another one.
func pickFolder(from, to string) pick {
	return func(name string) string {
		if rest, ok := strings.CutPrefix(name, from+"/"); ok {
			return path.Join(to, rest)
		}
		return ""
	}
}
