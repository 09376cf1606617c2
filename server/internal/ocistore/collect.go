package ocistore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
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

// references are what the manifests of all repositories refer to.
type references struct {
	// all has the hex digits of all manifests, and of the content that they name. The value is true for blobs that
	// findAbsent has looked for.
	all map[string]bool
	// damaged has the digests of damaged manifests. absent has the hex digits of needed blobs that are not there.
	damaged []string
	absent  map[string]bool
}

// names reports whether a manifest is or names the content with these hex digits.
func (r references) names(sum string) bool {
	_, ok := r.all[sum]
	return ok
}

// add notes that a manifest is or names the content with these hex digits.
func (r references) add(sum string) {
	if !r.names(sum) {
		r.all[sum] = false
	}
}

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

// eachManifest calls visit for each manifest of each repository. A manifest may be in several repositories.
func (s *Store) eachManifest(ctx context.Context, visit func(repo string, d digest.Digest) error) error {
	return fs.WalkDir(s.root.FS(), "repos", func(p string, d fs.DirEntry, err error) error {
		if err != nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		is := digest.NewDigestFromEncoded(algorithm(d.Name()), d.Name())
		if d.IsDir() || path.Base(path.Dir(p)) != "_manifests" || is.Validate() != nil {
			return nil
		}
		return visit(strings.TrimPrefix(path.Dir(path.Dir(p)), "repos/"), is)
	})
}

// referencedBlobs reads all manifests. It moves the damaged content of manifests aside. After an error, it goes on with
// the next manifest, so that it finds all damage. The references are then incomplete, and it returns the first error.
func (s *Store) referencedBlobs(ctx context.Context) (references, error) {
	refs := references{all: map[string]bool{}, absent: map[string]bool{}}
	read := map[string]bool{} // a manifest may be in several repositories
	var first error
	err := s.eachManifest(ctx, func(_ string, is digest.Digest) error {
		if read[is.Encoded()] {
			return nil
		}
		read[is.Encoded()] = true
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
	refs.add(name)
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
			refs.add(string(sum))
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
		refs.add(sum)
	}
	return s.findAbsent(m, *refs)
}

// findAbsent notes the blobs that a manifest needs and that are missing.
func (s *Store) findAbsent(m manifest, refs references) error {
	for _, desc := range m.blobs() {
		sum := desc.Digest.Encoded()
		if refs.all[sum] {
			continue
		}
		refs.all[sum] = true
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
