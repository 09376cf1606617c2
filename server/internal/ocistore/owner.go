package ocistore

import (
	"context"
	"fmt"

	"cuelabs.dev/go/oci/ociregistry"
)

// maxUploads is the maximum number of open uploads of one caller. It protects the disk and the folder of uploads.
const maxUploads = 64

type ownerKey struct{}

// withOwner returns a context with the name of the caller who pushes.
func withOwner(ctx context.Context, name string) context.Context {
	return context.WithValue(ctx, ownerKey{}, name)
}

// ownerOf returns the name in the context, or "".
func ownerOf(ctx context.Context) string {
	name, _ := ctx.Value(ownerKey{}).(string)
	return name
}

// own counts a new upload for a caller. It returns an error if the caller has too many. Uploads from before the start
// do not count, because nothing says who began them.
func (s *Store) own(id, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, owner := range s.owners {
		if owner == name {
			n++
		}
	}
	if n >= maxUploads {
		return fmt.Errorf("%w: %d uploads of this caller are open; end or delete one, or wait until they expire after %s",
			ociregistry.ErrTooManyRequests, n, uploadMaxAge)
	}
	s.owners[id] = name
	return nil
}

// disown ends the count of an upload.
func (s *Store) disown(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.owners, id)
}

// claim gives an upload to one request.
func (s *Store) claim(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy[id] {
		return fmt.Errorf("%w: another request writes to this upload", ociregistry.ErrBlobUploadInvalid)
	}
	s.busy[id] = true
	return nil
}

// release ends a claim.
func (s *Store) release(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.busy, id)
}
