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
	"strings"
	"syscall"
	"time"

	"github.com/gofrs/flock"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/prebake/prebake/pkg/fault"
)

// layoutStore is an OCI image layout (image-spec 1.1, image-layout.md). One
// entry of index.json stands for each manifest and tag; attachments have an
// entry without a tag, and their manifest's subject says what they belong to.
// Every file appears whole, under its final name, or not at all; writers of
// all processes take turns.
type layoutStore struct {
	dir   string
	files layoutFiles
}

// layoutFiles is where the files of a layout are.
type layoutFiles interface {
	// read reads a small file and open opens a blob of this size, which has to have as many
	// bytes; what is not there is [fs.ErrNotExist].
	read(ctx context.Context, name string, limit int64) ([]byte, error)
	open(ctx context.Context, name string, size int64) (io.ReadCloser, error)
	// cheap says that reading many small files is, and settled that nobody adds to a list of
	// referrers: then it has all.
	cheap() bool
	settled() bool
}

// folder has them in a folder.
type folder string

const (
	refName   = "org.opencontainers.image.ref.name"
	indexFile = "index.json"
	lockFile  = ".prebake.lock"
	tmpPrefix = ".prebake.tmp-"
	maxIndex  = 64 << 20
)

func openLayout(dir string) (*layoutStore, error) {
	if dir == "" {
		return nil, errors.New("no folder")
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	return &layoutStore{dir: abs, files: folder(abs)}, nil
}

func (s *layoutStore) blobPath(digest string) string {
	return filepath.Join(s.dir, "blobs", "sha256", strings.TrimPrefix(digest, "sha256:"))
}

// blobName is a blob's file below the layout.
func blobName(digest string) string { return "blobs/sha256/" + strings.TrimPrefix(digest, "sha256:") }

// index reads index.json; a folder that does not exist is empty.
func (s *layoutStore) index(ctx context.Context) (*v1.IndexManifest, error) {
	idx := &v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	raw, err := s.files.read(ctx, indexFile, maxIndex)
	if errors.Is(err, fs.ErrNotExist) {
		return idx, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, idx); err != nil {
		return nil, damaged(fmt.Errorf("read %s: %w", indexFile, err))
	}
	return idx, nil
}

func (folder) cheap() bool   { return true }
func (folder) settled() bool { return false }

func (f folder) read(_ context.Context, name string, limit int64) ([]byte, error) {
	file, err := os.Open(filepath.Join(string(f), name))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return readAll(file, name, limit)
}

func readAll(r io.Reader, name string, limit int64) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(raw)) > limit {
		err = fault.Errorf(fault.Unverified, "%s is longer than %d bytes", name, limit)
	}
	return raw, err
}

func (f folder) open(_ context.Context, name string, size int64) (io.ReadCloser, error) {
	file, err := os.Open(filepath.Join(string(f), name))
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && info.Size() > size {
		err = damaged(fmt.Errorf("%d bytes; want %d", info.Size(), size))
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

func (s *layoutStore) resolve(ctx context.Context, ref string) (v1.Descriptor, error) {
	idx, err := s.index(ctx)
	if err != nil {
		return v1.Descriptor{}, err
	}
	for _, d := range idx.Manifests {
		if d.Digest.String() == ref || d.Annotations[refName] == ref {
			return v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}, nil
		}
	}
	return v1.Descriptor{}, fault.New(fault.NoArtifact, "not in this folder", "")
}

func (s *layoutStore) manifest(ctx context.Context, digest string) ([]byte, error) {
	raw, err := s.files.read(ctx, blobName(digest), MaxManifest) // Repository compares it with its digest
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NoArtifact, "not in this folder", "")
	}
	return raw, err
}

// A layout lists what is attached to a manifest in two ways, and others read one
// of them each: oras takes entries of index.json whose manifest has a subject,
// regclient the list that stands under the tag of the referrers tag schema.

// listed returns the list under that tag, and its place in the index; nil and -1
// where there is none. What is no list of referrers says nothing.
func (s *layoutStore) listed(ctx context.Context, idx *v1.IndexManifest, subject string) (*v1.IndexManifest, int, error) {
	i := slices.IndexFunc(idx.Manifests, func(d v1.Descriptor) bool { return d.Annotations[refName] == listTag(subject) })
	if i < 0 {
		return nil, -1, nil
	}
	d := idx.Manifests[i]
	if !d.MediaType.IsIndex() || checkDigest(d.Digest.String()) != nil {
		return nil, i, nil
	}
	raw, err := s.files.read(ctx, blobName(d.Digest.String()), MaxManifest)
	if err != nil {
		return nil, i, err
	}
	if err := sameDigest(raw, d.Digest.String()); err != nil {
		return nil, i, err
	}
	list := &v1.IndexManifest{}
	if err := json.Unmarshal(raw, list); err != nil {
		return nil, i, damaged(err)
	}
	return list, i, nil
}

func (s *layoutStore) blob(ctx context.Context, digest string, size int64) (io.ReadCloser, error) {
	rc, err := s.files.open(ctx, blobName(digest), size)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Wrap(fault.NoArtifact, err, "")
	}
	return rc, err
}

func (s *layoutStore) referrers(ctx context.Context, digest string) ([]v1.Descriptor, error) {
	idx, err := s.index(ctx)
	if err != nil {
		return nil, err
	}
	var candidates []v1.Descriptor
	named, _, err := s.listed(ctx, idx, digest)
	if err != nil {
		return nil, err
	}
	if named != nil {
		candidates = append(candidates, named.Manifests...)
	}
	if named == nil || !s.files.settled() {
		for _, d := range slices.Backward(idx.Manifests) { // the newest first
			candidates = append(candidates, d)
		}
	}
	looks := 0
	var list []v1.Descriptor
	for _, d := range candidates {
		if !d.MediaType.IsImage() || checkDigest(d.Digest.String()) != nil {
			continue
		}
		if looks++; looks > maxLooks && !s.files.cheap() { // every one of them has to be read
			break
		}
		raw, err := s.files.read(ctx, blobName(d.Digest.String()), MaxManifest)
		if errors.Is(err, fs.ErrNotExist) || fault.Is(err, fault.Unverified) {
			continue // what was not copied, or is no manifest
		}
		if err != nil {
			return nil, err
		}
		var m v1.Manifest
		if json.Unmarshal(raw, &m) != nil || m.Subject == nil || m.Subject.Digest.String() != digest {
			continue
		}
		d.ArtifactType, d.Annotations = m.ArtifactType, m.Annotations
		if d.ArtifactType == "" {
			d.ArtifactType = string(m.Config.MediaType)
		}
		list = append(list, d)
	}
	return list, nil
}

func (s *layoutStore) push(ctx context.Context, img v1.Image) error {
	desc, err := describe(img)
	if err != nil {
		return err
	}
	return s.locked(ctx, func() error { return s.put(ctx, img, desc) })
}

func (s *layoutStore) attach(ctx context.Context, a *attachment) error {
	img, err := a.image()
	if err != nil {
		return err
	}
	return s.locked(ctx, func() error {
		if err := s.put(ctx, img, a.desc); err != nil {
			return err
		}
		return s.list(ctx, a.subject.String(), a.desc)
	})
}

// list adds a referrer to its subject's list; the caller holds the lock. The blob
// of the list before stays: readers take no lock.
func (s *layoutStore) list(ctx context.Context, subject string, d v1.Descriptor) error {
	idx, err := s.index(ctx)
	if err != nil {
		return err
	}
	list, i, err := s.listed(ctx, idx, subject)
	switch {
	case err != nil:
		return err
	case list == nil && i >= 0:
		return fault.New(fault.PublishRefused, "tag "+listTag(subject)+" is no list of referrers", "remove that entry from "+indexFile+" by hand, or publish to another folder")
	case list == nil:
		list = &v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
		if list.Manifests, err = s.referrers(ctx, subject); err != nil { // of before there was a list, d among them
			return err
		}
	case slices.ContainsFunc(list.Manifests, func(have v1.Descriptor) bool { return have.Digest == d.Digest }):
		return nil
	default:
		list.Manifests = append(list.Manifests, d)
	}
	raw, err := ReferrersList(list.Manifests)
	if err != nil {
		return err
	}
	entry := v1.Descriptor{MediaType: types.OCIImageIndex, Annotations: map[string]string{refName: listTag(subject)}}
	if entry.Digest, entry.Size, err = v1.SHA256(bytes.NewReader(raw)); err != nil {
		return err
	}
	if err := s.putBlob(ctx, entry.Digest, entry.Size, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil }); err != nil {
		return err
	}
	return s.edit(ctx, func(idx *v1.IndexManifest) bool {
		if i < 0 {
			idx.Manifests = append(idx.Manifests, entry)
		} else {
			idx.Manifests[i] = entry // nobody else writes: the index is what it was
		}
		return true
	})
}

// put writes blobs, then the manifest, then the index.
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
		if err := s.putBlob(ctx, digest, size, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil }); err != nil {
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

func (s *layoutStore) putBlob(ctx context.Context, digest v1.Hash, size int64, open func() (io.ReadCloser, error)) error {
	if err := checkDigest(digest.String()); err != nil {
		return err
	}
	path := s.blobPath(digest.String())
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Size() == size {
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
	return s.locked(ctx, func() error {
		have, err := s.resolve(ctx, tag)
		switch {
		case err == nil && have.Digest != d.Digest:
			return taken(have.Digest, d.Digest)
		case err == nil:
			return nil
		case !fault.Is(err, fault.NoArtifact):
			return err
		}
		if _, err := s.resolve(ctx, d.Digest.String()); err != nil {
			return err
		}
		return s.edit(ctx, func(idx *v1.IndexManifest) bool {
			entry := v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, Annotations: map[string]string{refName: tag}}
			for i, old := range idx.Manifests {
				if old.Digest == d.Digest && old.Annotations[refName] == "" {
					idx.Manifests[i] = entry // the entry that only kept it reachable
					return true
				}
			}
			idx.Manifests = append(idx.Manifests, entry)
			return true
		})
	})
}

// edit changes index.json; the caller holds the lock.
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

// locked runs f while no other writer of any process works on the folder. It
// makes the folder, and removes what writers that died left behind.
func (s *layoutStore) locked(ctx context.Context, f func() error) (err error) {
	if s.dir == "" {
		return readOnly()
	}
	if err := os.MkdirAll(filepath.Join(s.dir, "blobs", "sha256"), 0o755); err != nil {
		return denied(err)
	}
	lock := flock.New(filepath.Join(s.dir, lockFile))
	if _, err := lock.TryLockContext(ctx, 20*time.Millisecond); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("wait for another writer of %s: %w", s.dir, context.Cause(ctx))
		}
		return denied(err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	stale, err := filepath.Glob(filepath.Join(s.dir, tmpPrefix+"*"))
	if err != nil {
		return err
	}
	for _, path := range stale {
		if err := os.Remove(path); err != nil {
			return denied(err)
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

// write makes a file appear whole or not at all.
func (s *layoutStore) write(path string, fill func(io.Writer) error) error {
	f, err := os.CreateTemp(s.dir, tmpPrefix)
	if err != nil {
		return denied(err)
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
		return denied(errors.Join(err, os.Remove(f.Name())))
	}
	return nil
}

// denied gives an error of the disk its kind.
func denied(err error) error {
	switch {
	case fault.NoSpace(err):
		return fault.Wrap(fault.DiskFull, err, "free some space on the disk of this folder")
	case errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS):
		return fault.Wrap(fault.PublishRefused, err, "allow this user to write to the folder")
	}
	return err
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
