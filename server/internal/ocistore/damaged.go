package ocistore

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"math"
	"os"
	"slices"

	"cuelabs.dev/go/oci/ociregistry"
	"github.com/opencontainers/go-digest"
)

// moveAside moves a damaged blob to the folder damaged, unless another file than the open one has its path now.
func (s *Store) moveAside(f fs.File, d digest.Digest) (moved bool, err error) {
	s.collecting.Lock()
	defer s.collecting.Unlock()
	read, err := f.Stat()
	if err != nil {
		return false, err
	}
	now, err := s.root.Stat(blobPath(d.Encoded()))
	if errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(read, now) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := s.moveToFinal(blobPath(d.Encoded()), "damaged/"+d.Encoded()); err != nil {
		if _, serr := s.root.Lstat(blobPath(d.Encoded())); !errors.Is(serr, fs.ErrNotExist) {
			return false, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.absent[d.Encoded()] = true
	return true, nil
}

// damages returns the damage of absent blobs, which are given by their hex digits, in the order of the digits. After
// the first error, the numbers of manifests may be too small.
func (s *Store) damages(ctx context.Context, absent map[string]bool) (all []Damage, err error) {
	if len(absent) == 0 {
		return nil, nil
	}
	of := map[string]*Damage{}
	for _, sum := range slices.Sorted(maps.Keys(absent)) {
		all = append(all, Damage{Digest: string(digest.NewDigestFromEncoded(algorithm(sum), sum))})
	}
	for i := range all {
		of[digest.Digest(all[i].Digest).Encoded()] = &all[i]
	}
	var first error
	err = s.eachManifest(ctx, func(repo string, is digest.Digest) error {
		needs := []string{is.Encoded()}
		content, err := s.root.ReadFile(blobPath(is.Encoded()))
		if err != nil && !errors.Is(err, fs.ErrNotExist) && first == nil {
			first = err
		}
		var m manifest
		if err == nil && json.Unmarshal(content, &m) == nil {
			for _, desc := range m.blobs() {
				needs = append(needs, desc.Digest.Encoded())
			}
		}
		for _, sum := range needs {
			if d := of[sum]; d != nil {
				d.Manifests++
				if d.Manifest == "" {
					d.Manifest = repo + "@" + string(is)
				}
			}
		}
		return nil
	})
	return all, errors.Join(first, err)
}

// restore moves content of the folder damaged back to its path if its digest is right: the disk or the memory was at
// fault for a moment. It returns the digests of this content. Content that a push has brought back stays.
func (s *Store) restore(ctx context.Context) (back []string, err error) {
	entries, err := fs.ReadDir(s.root.FS(), "damaged")
	for _, e := range entries {
		is := digest.NewDigestFromEncoded(algorithm(e.Name()), e.Name())
		if is.Validate() != nil {
			continue
		}
		moved, rerr := s.restoreBlob(ctx, is)
		if moved {
			back = append(back, string(is))
		}
		err = errors.Join(err, rerr)
	}
	return back, err
}

// restoreBlob moves one blob or manifest back. Content that cannot be read stays, without an error.
func (s *Store) restoreBlob(ctx context.Context, is digest.Digest) (moved bool, err error) {
	from, to := "damaged/"+is.Encoded(), blobPath(is.Encoded())
	f, err := s.root.Open(from)
	if err != nil {
		return false, nil // it is known to be damaged
	}
	_, cause, err := readBlob(ctx, f, is, math.MaxInt64)
	if err := errors.Join(err, f.Close()); err != nil || cause != nil {
		return false, err
	}
	s.collecting.Lock()
	defer s.collecting.Unlock()
	if _, err := s.root.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return true, s.moveToFinal(from, to)
}

// readAbsent notes the content that was damaged before the start, and what could not be read or moved.
func (s *Store) readAbsent() error {
	for _, name := range s.readPlace().Kept {
		s.kept[name] = true
	}
	entries, err := fs.ReadDir(s.root.FS(), "damaged")
	for _, e := range entries {
		s.absent[e.Name()] = true
	}
	return err
}

// Damaged returns the number of blobs and manifests that are known to be damaged or lost, and were not pushed since
// then. A file or a folder that a verification could not read or move counts, too, until it can.
//
// Damaged does not hold s.mu while it looks for files, because uploads need the lock, and a disk may be slow.
func (s *Store) Damaged() int {
	s.mu.Lock()
	n, all := len(s.kept), slices.Collect(maps.Keys(s.absent))
	s.mu.Unlock()
	for _, sum := range all {
		if _, err := s.root.Stat(blobPath(sum)); err != nil {
			n++
			continue
		}
		s.mu.Lock()
		if s.isAbsent(sum) { // it was moved aside meanwhile
			n++
		}
		s.mu.Unlock()
	}
	return n
}

// isAbsent reports whether content is known to be damaged or lost, and was not pushed since then. s.mu must be held.
func (s *Store) isAbsent(sum string) bool {
	if !s.absent[sum] {
		return false
	}
	if _, err := s.root.Stat(blobPath(sum)); err == nil {
		delete(s.absent, sum)
		return false
	}
	return true
}

// lacks reports whether a manifest needs blobs that are known to be damaged or lost.
func (s *Store) lacks(repo, tagOrDigest string) bool {
	s.mu.Lock()
	none := len(s.absent) == 0
	s.mu.Unlock()
	if none {
		return false
	}
	d := ociregistry.Digest(tagOrDigest)
	if d.Validate() != nil {
		var err error
		if d, err = s.digestOfTag(repo, tagOrDigest); err != nil {
			return false
		}
	}
	_, content, err := s.readManifest(repo, d)
	var m manifest
	if err != nil || json.Unmarshal(content, &m) != nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, desc := range m.blobs() {
		if s.isAbsent(desc.Digest.Encoded()) {
			return true
		}
	}
	return false
}
