package bundle

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// CheckTree reports whether what [Unpack] once wrote below root is still what the
// signed config says: packed again it has this diff id, for equal trees have equal
// archives. It returns the SHA-256 digest of each regular file, by its name, as it was
// when it was read. Whatever is changed, missing or added is a fault of kind Unverified.
func CheckTree(ctx context.Context, root *os.Root, kind LayerKind, wantDiffID string) (map[string]string, error) {
	files, got, err := digestTree(ctx, root, kind)
	if ctx.Err() != nil {
		return nil, fmt.Errorf("check unpacked %s layer: %w", kind, context.Cause(ctx))
	}
	if err == nil && got != wantDiffID {
		err = fmt.Errorf("packed again it has digest %s; the config says %s", got, wantDiffID)
	}
	if err != nil {
		return nil, fault.Wrap(fault.Unverified, fmt.Errorf("check unpacked %s layer: %w", kind, err), "")
	}
	return files, nil
}

func digestTree(ctx context.Context, root *os.Root, kind LayerKind) (map[string]string, string, error) {
	entries, err := listTree(root, kind)
	if err != nil {
		return nil, "", err
	}
	files := map[string]string{}
	diff := &countHash{w: io.Discard, h: sha256.New()}
	err = writeTar(ctx, diff, entries, func(e entry) (io.ReadCloser, error) {
		// Whoever changes the tree meanwhile may put a pipe there.
		f, err := root.OpenFile(e.name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil, err
		}
		if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
			return nil, errors.Join(err, f.Close(), fmt.Errorf("%s is no regular file any more", e.name))
		}
		return &hashedFile{ReadCloser: f, h: sha256.New(), done: func(digest string) { files[e.name] = digest }}, nil
	})
	return files, diff.digest(), err
}

// hashedFile tells the digest of what was read of it when it is closed.
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
	f.done("sha256:" + hex.EncodeToString(f.h.Sum(nil)))
	return f.ReadCloser.Close()
}
