package registry

import (
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

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/prebake/prebake/pkg/fault"
)

// layoutStore is an OCI image layout (image-spec 1.1, image-layout.md). index.json has one entry for each manifest and
// tag, and one without a tag for each attached manifest. Every file appears complete under its final name, or not at
// all. A lock file lets only one process write at a time.
type layoutStore struct {
	dir   string
	files layoutFiles
}

// layoutFiles reads the files of a layout.
type layoutFiles interface {
	// read reads a small file. open opens a blob of at most size bytes. If the file does not exist, the error is
	// [fs.ErrNotExist].
	read(ctx context.Context, name string, limit int64) ([]byte, error)
	open(ctx context.Context, name string, size int64) (io.ReadCloser, error)
	// cheapReads reports whether it is cheap to read many small files. allAttached reports whether the list under the
	// referrers tag is complete.
	cheapReads() bool
	allAttached() bool
}

// folder implements [layoutFiles] for a folder on a disk.
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
		return nil, errors.New("the reference names no folder")
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

// blobName returns the path of a blob's file within the layout.
func blobName(digest string) string { return "blobs/sha256/" + strings.TrimPrefix(digest, "sha256:") }

// index reads index.json. A folder that does not exist has an empty index.
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

func (folder) cheapReads() bool  { return true }
func (folder) allAttached() bool { return false }

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
		err = fault.Errorf(fault.Unverified, "the file %s has more than %d bytes", name, limit)
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
		err = damaged(fmt.Errorf("the file has %d bytes; want %d bytes", info.Size(), size))
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
	return v1.Descriptor{}, fault.New(fault.NoArtifact, "the image layout has no such manifest", "")
}

func (s *layoutStore) manifest(ctx context.Context, digest string) ([]byte, error) {
	raw, err := s.files.read(ctx, blobName(digest), MaxManifest) // Repository.Manifest compares the bytes with the digest
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NoArtifact, "the image layout has no such manifest", "")
	}
	return raw, err
}

// A layout can list attached manifests in two ways. This package writes and reads both kinds of list:
//
//   - oras reads the entries of index.json whose manifest has a subject.
//   - regclient reads the list under the tag of the referrers tag schema.

// tagList returns the list under a subject's referrers tag, and the tag's position in the index. If the index has no
// such tag, tagList returns nil and -1. If the tag leads to something else than a list, the list is nil.
func (s *layoutStore) tagList(ctx context.Context, idx *v1.IndexManifest, subject string) (*v1.IndexManifest, int,
	error) {
	i := slices.IndexFunc(idx.Manifests, func(d v1.Descriptor) bool { return d.Annotations[refName] == listTag(subject) })
	if i < 0 {
		return nil, -1, nil
	}
	d := idx.Manifests[i]
	if !d.MediaType.IsIndex() || checkDigest(d.Digest.String()) != nil {
		return nil, i, nil
	}
	raw, err := s.files.read(ctx, blobName(d.Digest.String()), MaxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		err = damaged(fmt.Errorf("the list of referrers is missing: %w", err))
	}
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

func (s *layoutStore) has(ctx context.Context, d v1.Descriptor) (bool, error) {
	return Layout{s: s}.Has(ctx, d)
}

// referrers implements [store]. It reads each manifest that may be attached. If a web server denies access to a
// manifest, the result has its descriptor from the list. After another error, the result has the descriptors of all
// candidates that were not read.
func (s *layoutStore) referrers(ctx context.Context, digest string, unread bool) ([]v1.Descriptor, error) {
	idx, err := s.index(ctx)
	if err != nil {
		return nil, err
	}
	var candidates []v1.Descriptor
	fromTag, _, err := s.tagList(ctx, idx, digest)
	if err != nil {
		return nil, err
	}
	if fromTag != nil {
		candidates = append(candidates, fromTag.Manifests...)
	}
	if fromTag != nil && unread && s.files.allAttached() && !s.files.cheapReads() {
		return candidates, nil
	}
	if fromTag == nil || !s.files.allAttached() {
		for _, d := range slices.Backward(idx.Manifests) { // the newest first
			candidates = append(candidates, d)
		}
	}
	candidates = slices.DeleteFunc(candidates, func(d v1.Descriptor) bool { return d.Digest.String() == digest })
	looks := 0
	var list []v1.Descriptor
	for i, d := range candidates {
		if !d.MediaType.IsImage() || checkDigest(d.Digest.String()) != nil {
			continue
		}
		if looks++; looks > maxManifests && !s.files.cheapReads() { // each candidate costs a request
			break
		}
		raw, err := s.files.read(ctx, blobName(d.Digest.String()), MaxManifest)
		if errors.Is(err, fs.ErrNotExist) || fault.Is(err, fault.Unverified) {
			continue // the manifest was not copied, or the blob is not a manifest
		}
		if Denied(err) {
			list = append(list, d)
			continue
		}
		if err != nil {
			return append(list, candidates[i:]...), err
		}
		var m v1.Manifest
		if json.Unmarshal(raw, &m) != nil || m.Subject == nil || m.Subject.Digest.String() != digest {
			continue
		}
		d.ArtifactType, d.Annotations = ArtifactType(&m), m.Annotations
		list = append(list, d)
	}
	return list, nil
}
