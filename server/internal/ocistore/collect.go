package ocistore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"cuelabs.dev/go/oci/ociregistry"
	"github.com/opencontainers/go-digest"
)

// Collected is what one collection removed.
type Collected struct {
	Blobs int
	Bytes int64
	// Damaged has the digests of manifests whose content is wrong, missing or unreadable. The collection moved wrong
	// content aside, so that a push repairs the manifest. It kept the blobs that this content names.
	Damaged []string
	// DamagedBlobs are the blobs that manifests need, and that are lost or were moved aside.
	DamagedBlobs []Damage
	// Restored has the digests of content that was moved aside, and has the right digest now. It is back at its path.
	Restored []string
}

// Collect removes abandoned uploads, and unreferenced blobs that are older than a day. Pushes may run at the same time.
// A blob that a client asks for counts as new, and no blob is removed while a manifest is stored. If a manifest cannot
// be read, Collect removes no blobs, reports the damage that it finds, and returns an error.
func (s *Store) Collect(ctx context.Context, now time.Time) (out Collected, err error) {
	if _, err := s.dropUploads(now, uploadMaxAge); err != nil {
		return out, fmt.Errorf("collect blobs: %w", err)
	}
	var notRestored error
	out.Restored, notRestored = s.restore(ctx, now)
	refs, err := s.referencedBlobs(ctx)
	out.Damaged = refs.damaged
	s.noteAbsent(refs, err == nil)
	var derr error
	out.DamagedBlobs, derr = s.damages(ctx, refs.absent)
	if err = errors.Join(err, derr); err == nil {
		err = s.dropRepaired(refs)
	}
	if err == nil {
		err = s.dropBlobs(ctx, refs, now, &out)
	}
	if err = errors.Join(notRestored, err); err != nil {
		return out, fmt.Errorf("collect blobs: %w", err)
	}
	return out, nil
}

// dropBlobs removes old blobs that no manifest refers to, and counts them. A manifest that was pushed after the
// references were read has made its blobs new.
func (s *Store) dropBlobs(ctx context.Context, refs references, now time.Time, out *Collected) error {
	return fs.WalkDir(s.root.FS(), "blobs", func(p string, d fs.DirEntry, err error) error {
		if err != nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if d.IsDir() || refs.names(path.Base(p)) {
			return nil
		}
		n, err := s.collect(p, now)
		if err == nil && n >= 0 {
			out.Blobs++
			out.Bytes += n
		}
		return err
	})
}

// collect removes a blob and returns its size. It returns -1 if the blob is gone or has become new. A blob becomes new
// when a client asks for it or pushes a manifest with it.
func (s *Store) collect(p string, now time.Time) (int64, error) {
	s.collecting.Lock()
	defer s.collecting.Unlock()
	info, err := s.root.Stat(p)
	if errors.Is(err, fs.ErrNotExist) {
		return -1, nil
	}
	if err != nil {
		return -1, err
	}
	if now.Sub(info.ModTime()) <= blobMinAge {
		return -1, nil
	}
	return info.Size(), s.root.Remove(p)
}

// anyDigest matches the hex digits of digests in damaged content.
var anyDigest = regexp.MustCompile(`[0-9a-f]{128}|[0-9a-f]{64}`)

// blobs returns the descriptors of a manifest's blobs. It leaves out layers that may never be pushed, and malformed
// digests.
func (m manifest) blobs() (all []ociregistry.Descriptor) {
	for _, desc := range append(orNone(m.Config), m.Layers...) {
		if _, err := hexOf(desc.Digest); err == nil && !nondistributable(desc.MediaType) {
			all = append(all, desc)
		}
	}
	return all
}

// eachManifest calls visit for the manifests of all repositories, in the order of their digests in each repository. A
// manifest may be in several repositories. It reads only the names in a folder, because there may be some hundred
// thousand, and it does not enter the other folders of a repository.
func (s *Store) eachManifest(ctx context.Context, visit func(repo string, d digest.Digest) error) error {
	return fs.WalkDir(s.root.FS(), "repos", func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil || ctx.Err() != nil:
			return errors.Join(err, ctx.Err())
		case !d.IsDir() || !strings.HasPrefix(d.Name(), "_"):
			return nil
		case d.Name() != "_manifests":
			return fs.SkipDir
		}
		names, err := s.namesIn(p)
		if err != nil {
			return err
		}
		repo := strings.TrimPrefix(path.Dir(p), "repos/")
		for _, name := range names {
			is := digest.NewDigestFromEncoded(algorithm(name), name)
			if is.Validate() != nil {
				continue
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := visit(repo, is); err != nil {
				return err
			}
		}
		return fs.SkipDir
	})
}

// namesIn returns the sorted names of the files in a folder.
func (s *Store) namesIn(dir string) ([]string, error) {
	f, err := s.root.Open(dir)
	if err != nil {
		return nil, err
	}
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	return names, errors.Join(err, f.Close())
}

// referencedBlobs reads all manifests. It moves the damaged content of manifests aside. After an error, it goes on with
// the next manifest, so that it finds all damage. The references are then incomplete, and it returns the first error.
func (s *Store) referencedBlobs(ctx context.Context) (references, error) {
	refs := newReferences()
	var first error
	err := s.eachManifest(ctx, func(_ string, is digest.Digest) error {
		if refs.add(is.Encoded(), read) {
			return nil
		}
		if err := s.addManifest(is, &refs); err != nil && first == nil {
			first = fmt.Errorf("read the references of manifest %s: %w", is, err)
		}
		return nil
	})
	return refs, errors.Join(first, err)
}

// addManifest notes what one manifest refers to.
func (s *Store) addManifest(is digest.Digest, refs *references) error {
	name := is.Encoded()
	content, err := s.root.ReadFile(blobPath(name))
	gone := errors.Is(err, fs.ErrNotExist)
	if gone {
		content, err = s.root.ReadFile("damaged/" + name)
	}
	if err != nil && !(gone && errors.Is(err, fs.ErrNotExist)) {
		refs.damaged = append(refs.damaged, string(is))
		return err
	}
	var m manifest
	wrong := is.Algorithm().FromBytes(content) != is
	if gone || wrong || json.Unmarshal(content, &m) != nil {
		refs.damaged = append(refs.damaged, string(is))
		for _, sum := range anyDigest.FindAll(content, -1) {
			refs.add(string(sum), named)
		}
		if wrong && !gone {
			return s.setAside(is)
		}
		return nil
	}
	for _, desc := range append(append(m.Layers, m.Manifests...), orNone(m.Config)...) {
		sum, err := hexOf(desc.Digest)
		if err != nil {
			return err
		}
		refs.add(sum, named)
	}
	return s.findAbsent(m, *refs)
}

// findAbsent notes the blobs that a manifest needs and that are missing.
func (s *Store) findAbsent(m manifest, refs references) error {
	for _, desc := range m.blobs() {
		sum := desc.Digest.Encoded()
		if refs.add(sum, looked) {
			continue
		}
		_, err := s.root.Stat(blobPath(sum))
		if errors.Is(err, fs.ErrNotExist) {
			refs.absent[sum] = true
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// noteAbsent notes damaged manifests and absent blobs. If the references are complete, it forgets content that no
// manifest names any more.
func (s *Store) noteAbsent(refs references, complete bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for sum := range s.absent {
		if complete && !refs.names(sum) {
			delete(s.absent, sum)
		}
	}
	for sum := range refs.absent {
		s.absent[sum] = true
	}
	for _, d := range refs.damaged {
		s.absent[digest.Digest(d).Encoded()] = true
	}
}

// setAside moves the damaged content of a manifest out of the blobs, unless a push has repaired it meanwhile.
func (s *Store) setAside(d digest.Digest) error {
	s.collecting.Lock()
	defer s.collecting.Unlock()
	content, err := s.root.ReadFile(blobPath(d.Encoded()))
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && d.Algorithm().FromBytes(content) == d:
		return nil
	case err != nil:
		return err
	}
	s.mu.Lock()
	delete(s.reread, d.Encoded())
	s.mu.Unlock()
	return s.moveToFinal(blobPath(d.Encoded()), "damaged/"+d.Encoded())
}

// dropRepaired removes damaged content that was moved aside, if it was pushed again, or if no manifest names it any
// more.
func (s *Store) dropRepaired(refs references) error {
	entries, err := fs.ReadDir(s.root.FS(), "damaged")
	for _, e := range entries {
		name := e.Name()
		if refs.names(name) {
			_, serr := s.root.Stat(blobPath(name))
			if errors.Is(serr, fs.ErrNotExist) {
				continue
			}
			if serr != nil {
				err = errors.Join(err, serr)
				continue
			}
		}
		err = errors.Join(err, s.root.Remove("damaged/"+name))
		s.mu.Lock()
		delete(s.reread, name)
		s.mu.Unlock()
	}
	return err
}

func orNone(d *ociregistry.Descriptor) []ociregistry.Descriptor {
	if d == nil {
		return nil
	}
	return []ociregistry.Descriptor{*d}
}

// touchEvery is the minimum pause between two changes of a blob's time. It saves writes.
const touchEvery = time.Hour

// touch sets a blob's time to now, so that collection keeps it: a client will probably push a manifest that refers to
// it.
func (s *Store) touch(name string, info fs.FileInfo) error {
	if time.Since(info.ModTime()) < touchEvery {
		return nil
	}
	now := time.Now()
	return s.root.Chtimes(name, now, now)
}
