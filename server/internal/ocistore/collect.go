package ocistore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"time"

	"cuelabs.dev/go/oci/ociregistry"
)

// Collected is what a collection removed.
type Collected struct {
	Blobs int
	Bytes int64
}

// Collect removes uploads that nobody goes on with, and blobs that no manifest of any
// repository names and that are older than a day. It may run beside pushes: a blob
// that somebody asked for lately counts as new, and a manifest is stored only when
// all of its blobs are there, which no collection changes meanwhile.
func (s *Store) Collect(ctx context.Context, now time.Time) (out Collected, err error) {
	if err := s.dropUploads(now); err != nil {
		return out, fmt.Errorf("collect: %w", err)
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
	if err != nil || len(old) == 0 {
		return out, err
	}
	named, err := s.named(ctx)
	if err != nil {
		return out, fmt.Errorf("collect: %w", err)
	}
	for _, p := range old {
		if named[path.Base(p)] {
			continue
		}
		n, err := s.collect(p, now)
		if err != nil {
			return out, fmt.Errorf("collect: %w", err)
		}
		if n >= 0 {
			out.Blobs++
			out.Bytes += n
		}
	}
	return out, ctx.Err()
}

// collect removes one blob, unless somebody asked for it since; -1 is not removed. A
// manifest that names it may have come since the list was made: such a blob was asked
// for before, by the check of the manifest.
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

// named returns the digests, without their algorithm, that manifests name, with those
// of the manifests themselves.
func (s *Store) named(ctx context.Context) (map[string]bool, error) {
	all := map[string]bool{}
	err := fs.WalkDir(s.root.FS(), "repos", func(p string, d fs.DirEntry, err error) error {
		if err != nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if d.IsDir() || path.Base(path.Dir(p)) != "_manifests" || all[d.Name()] {
			return nil
		}
		all[d.Name()] = true
		content, err := s.root.ReadFile(blobPath(d.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			return nil // its entry is older than a crash: nothing can be read through it
		}
		if err != nil {
			return err
		}
		var m manifest
		if err := json.Unmarshal(content, &m); err != nil {
			return fmt.Errorf("manifest %s: %w", d.Name(), err)
		}
		for _, desc := range append(append(m.Layers, m.Manifests...), orNone(m.Config)...) {
			all[desc.Digest.Encoded()] = true
		}
		return nil
	})
	return all, err
}

func orNone(d *ociregistry.Descriptor) []ociregistry.Descriptor {
	if d == nil {
		return nil
	}
	return []ociregistry.Descriptor{*d}
}

// touched is how long a blob that was asked for stays as new as it is.
const touched = time.Hour

// touch makes a blob new: somebody is about to name it.
func (s *Store) touch(name string, info fs.FileInfo) error {
	if time.Since(info.ModTime()) < touched {
		return nil
	}
	now := time.Now()
	return s.root.Chtimes(name, now, now)
}
