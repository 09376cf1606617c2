package bundle

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"syscall"

	ocidigest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// Names returns the names of all files, folders and links below root, for [CheckTree]. If a name does not belong to a
// layer of this kind, Names returns an error.
func Names(root *os.Root, kind LayerKind) ([]string, error) {
	entries, err := listTree(root, kind)
	if err != nil {
		return nil, fmt.Errorf("list the files of the %s layer: %w", kind, err)
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.name
	}
	return names, nil
}

// CheckTree checks that an unpacked layer below root still matches the signed config. It packs the entries with these
// names again and compares the diff ID. If names is nil, it packs all entries. The names may come from an untrusted
// source: with wrong names the diff ID does not match.
//
// For a layer of modules, CheckTree also returns the SHA-256 digest of each file, by name. If a file was changed or is
// missing, the error is of kind Unverified. If memory or file handles ran out, the error is of kind Transient.
func CheckTree(ctx context.Context, root *os.Root, kind LayerKind, wantDiffID string,
	names []string) (map[string]string, error) {
	files, got, err := digestTree(ctx, root, kind, names)
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("check unpacked %s layer: %w", kind, context.Cause(ctx))
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
		return nil, fault.Wrap(fault.Transient, fmt.Errorf("check unpacked %s layer: %w", kind, err), "run the command again")
	case err == nil && got != wantDiffID:
		err = fmt.Errorf("the layer has digest %s when packed again; the image config says %s", got, wantDiffID)
	}
	if err != nil {
		return nil, fault.Wrap(fault.Unverified, fmt.Errorf("check unpacked %s layer: %w", kind, err), "")
	}
	return files, nil
}

func digestTree(ctx context.Context, root *os.Root, kind LayerKind, names []string) (map[string]string, string, error) {
	diff := &countHash{w: io.Discard, h: sha256.New()}
	files, err := packTree(ctx, root, kind, names, diff)
	return files, diff.digest(), err
}

// packTree writes the archive of an unpacked layer to w. For a layer of modules, it also returns each file's digest.
func packTree(ctx context.Context, root *os.Root, kind LayerKind, names []string, w io.Writer) (map[string]string,
	error) {
	var entries []entry
	var err error
	if names == nil {
		entries, err = listTree(root, kind)
	} else {
		entries, err = entriesByName(root, names)
	}
	if err != nil {
		return nil, err
	}
	files := map[string]string{}
	return files, writeTar(ctx, w, entries, func(e entry) (io.ReadCloser, error) {
		// Another process may have replaced the file by a pipe, so the open must not block.
		f, err := root.OpenFile(e.name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil, err
		}
		info, err := f.Stat()
		if err == nil && !info.Mode().IsRegular() {
			err = fmt.Errorf("%s was replaced: it is no longer a regular file", e.name)
		}
		if err == nil {
			err = checkPlain(e.name, info)
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if kind != LayerModules { // no caller needs digests of the files of other layers, which have ten times as many bytes
			return f, nil
		}
		return &hashedFile{ReadCloser: f, h: sha256.New(), done: func(digest string) { files[e.name] = digest }}, nil
	})
}

// entriesByName returns the entries below root that have these names. The names must be in the archive's order.
func entriesByName(root *os.Root, names []string) ([]entry, error) {
	if len(names) > maxEntries {
		return nil, fmt.Errorf("the layer has more than %d files and folders", maxEntries)
	}
	var entries []entry
	var total int64
	for _, name := range names {
		if err := checkName(name); err != nil {
			return nil, err
		}
		info, err := root.Lstat(name)
		if err != nil {
			return nil, err
		}
		e := entry{name: name, mode: info.Mode()}
		switch info.Mode().Type() {
		case 0:
			if e.size = info.Size(); total+e.size > maxBytes/2 {
				return nil, fmt.Errorf("the files of the layer have more than %d bytes", int64(maxBytes/2))
			}
			total += e.size
		case fs.ModeDir:
			if err := checkPlain(name, info); err != nil {
				return nil, err
			}
		case fs.ModeSymlink:
			if e.link, err = root.Readlink(name); err != nil {
				return nil, err
			}
		default:
			return nil, fmt.Errorf("%s has file type %s; want a folder, regular file or link", name, info.Mode().Type())
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// checkPlain refuses a file with an owner, write permissions or special bits that [Unpack] never gives to a file. The
// diff ID does not show these differences.
func checkPlain(name string, info fs.FileInfo) error {
	if info.Mode()&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky) != 0 || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s has mode %s; want a mode without special bits that lets only the owner write", name,
			info.Mode())
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to the user with id %d; want id %d", name, st.Uid, os.Geteuid())
	}
	return nil
}

// hashedFile calls done at Close with the digest of the bytes that were read.
type hashedFile struct {
	io.ReadCloser
	h    hash.Hash
	done func(digest string)
}

func (f *hashedFile) Read(p []byte) (int, error) {
	n, err := f.ReadCloser.Read(p)
	f.h.Write(p[:n]) // a hash never returns an error
	return n, err
}

func (f *hashedFile) Close() error {
	f.done(ocidigest.NewDigest(ocidigest.SHA256, f.h).String())
	return f.ReadCloser.Close()
}
