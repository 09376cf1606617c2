package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/gofrs/flock"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/fault"
)

func (s *layoutStore) push(ctx context.Context, img v1.Image) error {
	desc, err := describe(img)
	if err != nil {
		return err
	}
	return s.withLock(ctx, func() error { return s.put(ctx, img, desc) })
}

func (s *layoutStore) attach(ctx context.Context, a *attachment) error {
	img, err := a.image()
	if err != nil {
		return err
	}
	subject := a.subject.String()
	return s.withLock(ctx, func() error {
		list, err := s.listWith(ctx, subject, a.desc)
		if err != nil {
			return err
		}
		if err := s.put(ctx, img, a.desc); err != nil {
			return err
		}
		return s.putList(ctx, subject, list)
	})
}

// listWith returns the list of a subject's referrers with d added, or nil if d is listed already. The caller must hold
// the lock.
func (s *layoutStore) listWith(ctx context.Context, subject string, d v1.Descriptor) ([]byte, error) {
	idx, err := s.index(ctx)
	if err != nil {
		return nil, err
	}
	var all []v1.Descriptor
	list, i, err := s.tagList(ctx, idx, subject)
	switch {
	case err != nil:
		return nil, err
	case list != nil:
		all = list.Manifests
	case i >= 0:
		return nil, fault.New(fault.PublishRefused,
			"tag "+listTag(subject)+" must be the list of the artifact's attestations, but it is something else",
			"remove that tag from "+indexFile+" by hand, or publish to another folder")
	default:
		if all, err = s.referrers(ctx, subject, false); err != nil { // manifests that were attached before the list existed
			return nil, err
		}
	}
	if !slices.ContainsFunc(all, func(have v1.Descriptor) bool { return have.Digest == d.Digest }) {
		all = append(all, d)
	} else if list != nil {
		return nil, nil
	}
	raw, err := ReferrersList(all)
	if err == nil && len(raw) > MaxManifest { // readers refuse a longer list
		err = fault.New(fault.PublishRefused,
			fmt.Sprintf("the list of referrers of %s would have %d bytes; want at most %d bytes", subject, len(raw),
				MaxManifest),
			"attach with shorter annotations, or publish to another folder")
	}
	return raw, err
}

// putList writes the list from [layoutStore.listWith]. The caller must hold the lock. The blob of the former list
// stays, because readers take no lock.
func (s *layoutStore) putList(ctx context.Context, subject string, raw []byte) error {
	if raw == nil {
		return nil
	}
	tag := listTag(subject)
	entry := v1.Descriptor{MediaType: ReferrersListType, Annotations: map[string]string{refName: tag}}
	var err error
	if entry.Digest, entry.Size, err = v1.SHA256(bytes.NewReader(raw)); err != nil {
		return err
	}
	if err := s.putBlob(ctx, entry.Digest, entry.Size,
		func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil }); err != nil {
		return err
	}
	return s.edit(ctx, func(idx *v1.IndexManifest) bool {
		i := slices.IndexFunc(idx.Manifests, func(d v1.Descriptor) bool { return d.Annotations[refName] == tag })
		if i < 0 {
			idx.Manifests = append(idx.Manifests, entry)
		} else {
			idx.Manifests[i] = entry
		}
		return true
	})
}

// put writes the blobs, then the manifest, then the index.
func (s *layoutStore) put(ctx context.Context, img v1.Image, desc v1.Descriptor) error {
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		digest, err := l.Digest()
		if err != nil {
			return err
		}
		size, err := l.Size()
		if err != nil {
			return err
		}
		if err := s.putBlob(ctx, digest, size, l.Compressed); err != nil {
			return err
		}
	}
	config, err := img.RawConfigFile()
	if err != nil {
		return err
	}
	manifest, err := img.RawManifest()
	if err != nil {
		return err
	}
	for _, raw := range [][]byte{config, manifest} {
		digest, size, err := v1.SHA256(bytes.NewReader(raw))
		if err != nil {
			return err
		}
		if err := s.putBlob(ctx, digest, size,
			func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil }); err != nil {
			return err
		}
	}
	return s.edit(ctx, func(idx *v1.IndexManifest) bool {
		for _, d := range idx.Manifests {
			if d.Digest == desc.Digest {
				return false
			}
		}
		idx.Manifests = append(idx.Manifests, desc)
		return true
	})
}

// isIntact reports whether a regular file has this size and digest.
func isIntact(path string, digest v1.Hash, size int64) bool {
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() || info.Size() != size {
		return false
	}
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	got, _, err := v1.SHA256(f)
	return err == nil && got == digest
}

// putBlob writes a blob, unless the layout has it already. A damaged blob is replaced.
func (s *layoutStore) putBlob(ctx context.Context, digest v1.Hash, size int64,
	open func() (io.ReadCloser, error)) error {
	if err := checkDigest(digest.String()); err != nil {
		return err
	}
	path := s.blobPath(digest.String())
	if isIntact(path, digest, size) {
		return nil
	}
	rc, err := open()
	if err != nil {
		return err
	}
	defer rc.Close()
	hasher, err := v1.Hasher("sha256")
	if err != nil {
		return err
	}
	return s.write(path, func(w io.Writer) error {
		n, err := io.Copy(io.MultiWriter(w, hasher), readerFunc(func(p []byte) (int, error) {
			if ctx.Err() != nil {
				return 0, context.Cause(ctx)
			}
			return rc.Read(p)
		}))
		if err == nil && (n != size || fmt.Sprintf("%x", hasher.Sum(nil)) != digest.Hex) {
			err = fault.Errorf(fault.Unverified, "blob %s changed while it was read", digest)
		}
		return err
	})
}

func (s *layoutStore) tag(ctx context.Context, d v1.Descriptor, tag string) error {
	return s.withLock(ctx, func() error {
		have, err := s.resolve(ctx, tag)
		switch {
		case err == nil && have.Digest != d.Digest:
			return errTagTaken(have.Digest, d.Digest)
		case err == nil:
			return nil
		case !fault.Is(err, fault.NoArtifact):
			return err
		}
		if _, err := s.resolve(ctx, d.Digest.String()); err != nil {
			return err
		}
		return s.edit(ctx, func(idx *v1.IndexManifest) bool {
			entry := v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size,
				Annotations: map[string]string{refName: tag}}
			for i, old := range idx.Manifests {
				if old.Digest == d.Digest && old.Annotations[refName] == "" {
					idx.Manifests[i] = entry // the entry without a tag is not needed any more
					return true
				}
			}
			idx.Manifests = append(idx.Manifests, entry)
			return true
		})
	})
}

// edit changes index.json. The caller must hold the lock.
func (s *layoutStore) edit(ctx context.Context, change func(*v1.IndexManifest) bool) error {
	idx, err := s.index(ctx)
	if err != nil {
		return err
	}
	if !change(idx) {
		return nil
	}
	raw, err := json.MarshalIndent(idx, "", "  ")
	if err != nil {
		return err
	}
	return s.write(filepath.Join(s.dir, indexFile), func(w io.Writer) error {
		_, err := w.Write(raw)
		return err
	})
}

// withLock keeps out other writers of any process, and runs the callback. It creates the folder, and removes the
// temporary files of dead writers.
func (s *layoutStore) withLock(ctx context.Context, f func() error) (err error) {
	if s.dir == "" {
		return readOnly()
	}
	if err := os.MkdirAll(filepath.Join(s.dir, "blobs", "sha256"), 0o755); err != nil {
		return writeFailure(err)
	}
	lock := flock.New(filepath.Join(s.dir, lockFile))
	if _, err := lock.TryLockContext(ctx, 20*time.Millisecond); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("wait for another writer of %s: %w", s.dir, context.Cause(ctx))
		}
		return writeFailure(err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	stale, err := filepath.Glob(filepath.Join(s.dir, tmpPrefix+"*"))
	if err != nil {
		return err
	}
	for _, path := range stale {
		if err := os.Remove(path); err != nil {
			return writeFailure(err)
		}
	}
	marker := filepath.Join(s.dir, "oci-layout")
	if _, err := os.Stat(marker); errors.Is(err, fs.ErrNotExist) {
		err := s.write(marker, func(w io.Writer) error {
			_, err := io.WriteString(w, `{"imageLayoutVersion":"1.0.0"}`)
			return err
		})
		if err != nil {
			return err
		}
	}
	return f()
}

// write writes a file atomically.
func (s *layoutStore) write(path string, fill func(io.Writer) error) error {
	f, err := os.CreateTemp(s.dir, tmpPrefix)
	if err != nil {
		return writeFailure(err)
	}
	err = fill(f)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return writeFailure(errors.Join(err, os.Remove(f.Name())))
	}
	return nil
}

// writeFailure adds a fault kind and a hint if the disk is full or the user may not write. Other errors stay unchanged.
func writeFailure(err error) error {
	switch {
	case fault.NoSpace(err):
		return fault.Wrap(fault.DiskFull, err, "free space on the disk of the destination folder")
	case errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS):
		return fault.Wrap(fault.PublishRefused, err, "allow this user to write to the destination folder")
	}
	return err
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
