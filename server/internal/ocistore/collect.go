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
	"time"

	"cuelabs.dev/go/oci/ociregistry"
	"github.com/opencontainers/go-digest"
)

// Collected is what one collection removed.
type Collected struct {
	Blobs int
	Bytes int64
	// Damaged has the digests of manifests whose content is wrong or missing. The collection moved wrong content aside, so
	// that a push repairs the manifest. It kept the blobs that this content names.
	Damaged []string
}

// Collect removes abandoned uploads, and unreferenced blobs that are older than a day. Pushes may run at the same time.
// A blob that a client asks for counts as new, and no blob is removed while a manifest is stored. If a manifest cannot
// be read, Collect removes no blobs and returns an error.
func (s *Store) Collect(ctx context.Context, now time.Time) (out Collected, err error) {
	if _, err := s.dropUploads(now, uploadMaxAge); err != nil {
		return out, fmt.Errorf("collect blobs: %w", err)
	}
	var old []string
	err = fs.WalkDir(s.root.FS(), "blobs", func(p string, d fs.DirEntry, err error) error {
		if err != nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if d.IsDir() {
			return nil
		}
		info, err := d.Info()
		if err == nil && now.Sub(info.ModTime()) > blobMinAge {
			old = append(old, p)
		}
		return err
	})
	if err != nil {
		return out, err
	}
	referenced, damaged, err := s.referencedBlobs(ctx)
	out.Damaged = damaged
	if err == nil {
		err = s.dropRepaired(damaged)
	}
	if err != nil {
		return out, fmt.Errorf("collect blobs: %w", err)
	}
	for _, p := range old {
		if referenced[path.Base(p)] {
			continue
		}
		n, err := s.collect(p, now)
		if err != nil {
			return out, fmt.Errorf("collect blobs: %w", err)
		}
		if n >= 0 {
			out.Blobs++
			out.Bytes += n
		}
	}
	return out, ctx.Err()
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

// referencedBlobs returns the digests of all manifests and their blobs, as hex digits. It also returns the digests of
// damaged manifests.
func (s *Store) referencedBlobs(ctx context.Context) (all map[string]bool, damaged []string, err error) {
	all = map[string]bool{}
	read := map[string]bool{} // a manifest may be in several repositories
	err = fs.WalkDir(s.root.FS(), "repos", func(p string, d fs.DirEntry, err error) error {
		if err != nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		is := digest.NewDigestFromEncoded(algorithm(d.Name()), d.Name())
		if d.IsDir() || path.Base(path.Dir(p)) != "_manifests" || read[d.Name()] || is.Validate() != nil {
			return nil
		}
		all[d.Name()], read[d.Name()] = true, true
		content, err := s.root.ReadFile(blobPath(d.Name()))
		gone := errors.Is(err, fs.ErrNotExist)
		if gone {
			content, err = s.root.ReadFile("damaged/" + d.Name())
		}
		if err != nil && !(gone && errors.Is(err, fs.ErrNotExist)) {
			return err
		}
		var m manifest
		wrong := is.Algorithm().FromBytes(content) != is
		if gone || wrong || json.Unmarshal(content, &m) != nil {
			damaged = append(damaged, string(is))
			for _, sum := range anyDigest.FindAll(content, -1) {
				all[string(sum)] = true
			}
			if wrong && !gone {
				return s.setAside(is)
			}
			return nil
		}
		for _, desc := range append(append(m.Layers, m.Manifests...), orNone(m.Config)...) {
			sum, err := hexOf(desc.Digest)
			if err != nil {
				return fmt.Errorf("manifest %s: %w", d.Name(), err)
			}
			all[sum] = true
		}
		return nil
	})
	return all, damaged, err
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
	return s.moveToFinal(blobPath(d.Encoded()), "damaged/"+d.Encoded())
}

// dropRepaired removes the damaged content of manifests that are not damaged any more, or deleted.
func (s *Store) dropRepaired(damaged []string) error {
	entries, err := fs.ReadDir(s.root.FS(), "damaged")
	for _, e := range entries {
		d := digest.NewDigestFromEncoded(algorithm(e.Name()), e.Name())
		if !slices.Contains(damaged, string(d)) {
			err = errors.Join(err, s.root.Remove("damaged/"+e.Name()))
		}
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
