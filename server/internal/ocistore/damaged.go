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
	"time"

	"cuelabs.dev/go/oci/ociregistry"
	"github.com/opencontainers/go-digest"
)

// moveAside moves a damaged blob to the folder damaged, unless the blob's path now leads to another file than f.
func (s *Store) moveAside(f fs.File, d digest.Digest) (moved bool, err error) {
	s.collecting.Lock()
	defer s.collecting.Unlock()
	if same, err := s.isAt(f, blobPath(d.Encoded())); !same {
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
	delete(s.reread, d.Encoded())
	return true, nil
}

// isAt reports whether an open file is the one at a path.
func (s *Store) isAt(f fs.File, name string) (bool, error) {
	opened, err := f.Stat()
	if err != nil {
		return false, err
	}
	now, err := s.root.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(opened, now), err
}

// damages returns the damage of each absent blob, sorted by hex digits. The keys of absent are the hex digits of these
// blobs. If there is an error, the numbers of manifests may be too small.
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

// rereadEvery is the minimum time between two reads of content in the folder damaged. Collections come every six hours.
const rereadEvery = 23 * time.Hour

// restore moves content of the folder damaged back to its path if its digest is right: the disk or the memory was at
// fault for a moment. It returns the digests of this content. Content that a push has brought back stays. restore reads
// each content about once a day, because a damaged disk may take minutes for it.
func (s *Store) restore(ctx context.Context, now time.Time) (back []string, err error) {
	entries, err := fs.ReadDir(s.root.FS(), "damaged")
	for _, e := range entries {
		is := digest.NewDigestFromEncoded(algorithm(e.Name()), e.Name())
		if is.Validate() != nil || !s.mayReread(e.Name(), now) {
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

// mayReread reports whether content of the folder damaged may be read again, and records that it is.
func (s *Store) mayReread(sum string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at, ok := s.reread[sum]; ok && now.Sub(at) < rereadEvery {
		return false
	}
	s.reread[sum] = now
	return true
}

// restoreBlob moves one blob or manifest back. Content that cannot be read stays, without an error.
func (s *Store) restoreBlob(ctx context.Context, is digest.Digest) (moved bool, err error) {
	from, to := "damaged/"+is.Encoded(), blobPath(is.Encoded())
	if _, err := s.root.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	f, err := s.openBlob(from) // it stays open until the move, so that no other file gets its inode number
	if err != nil {
		return false, nil // it is known to be damaged
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, cause, err := readBlob(ctx, f, is, math.MaxInt64); err != nil || cause != nil {
		return false, err
	}
	s.collecting.Lock()
	defer s.collecting.Unlock()
	if _, err := s.root.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if same, err := s.isAt(f, from); !same {
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

// lacks reports whether a manifest needs content that is known to be damaged or lost: a blob, or for an index a
// manifest or what that needs.
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
	return s.lacksAny(repo, d, map[ociregistry.Digest]bool{})
}

// lacksAny is lacks for a digest. It does not read the manifests in seen, because indexes may share them.
func (s *Store) lacksAny(repo string, d ociregistry.Digest, seen map[ociregistry.Digest]bool) bool {
	seen[d] = true
	_, content, err := s.readManifest(repo, d)
	var m manifest
	if err != nil || json.Unmarshal(content, &m) != nil {
		return false
	}
	if s.anyAbsent(append(m.blobs(), m.Manifests...)) {
		return true
	}
	for _, desc := range m.Manifests {
		if !seen[desc.Digest] && s.lacksAny(repo, desc.Digest, seen) {
			return true
		}
	}
	return false
}

// anyAbsent reports whether any of this content is known to be damaged or lost.
func (s *Store) anyAbsent(content []ociregistry.Descriptor) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, desc := range content {
		if sum, err := hexOf(desc.Digest); err == nil && s.isAbsent(sum) {
			return true
		}
	}
	return false
}
