package ocistore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"cuelabs.dev/go/oci/ociregistry"
)

// maxUploads is the maximum number of open uploads of one caller. It protects the disk and the folder of uploads.
const maxUploads = 64

// If nobody has written to an upload for uploadIdle, a new upload of the same caller may replace it. The time is longer
// than any pause of a client that is still there.
const uploadIdle = 10 * time.Minute

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

// own counts a new upload for a caller, and claims it for the present request. At the maximum, it first removes the
// caller's oldest idle upload, or returns an error if there is none. Uploads from before the start do not count,
// because nothing says who began them.
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
		switch dropped, err := s.dropIdle(name); {
		case err != nil:
			return fmt.Errorf("remove an idle upload: %w", err)
		case !dropped:
			return fmt.Errorf("%w: %d uploads of this caller are open; end or delete one, or wait until one is idle for %s",
				ociregistry.ErrTooManyRequests, n, uploadIdle)
		}
	}
	s.owners[id], s.busy[id] = name, true
	return nil
}

// dropIdle removes a caller's oldest idle upload, and reports whether there was one. If the files of other uploads are
// gone, it removes no file, but stops counting these uploads and returns true. s.mu must be held.
func (s *Store) dropIdle(name string) (bool, error) {
	oldest, at, gone := "", s.now().Add(-uploadIdle), false
	for id, owner := range s.owners {
		if owner != name || s.busy[id] {
			continue
		}
		info, err := s.root.Stat("uploads/" + id)
		if errors.Is(err, fs.ErrNotExist) {
			delete(s.owners, id)
			gone = true
			continue
		}
		if err != nil {
			return false, err
		}
		if info.ModTime().Before(at) {
			oldest, at = id, info.ModTime()
		}
	}
	if gone || oldest == "" {
		return gone, nil
	}
	if err := s.root.Remove("uploads/" + oldest); err != nil {
		return false, err
	}
	delete(s.owners, oldest)
	return true, nil
}

// disown stops counting an upload for its caller.
func (s *Store) disown(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.owners, id)
}

// claim reserves an upload for one request, until [Store.release].
func (s *Store) claim(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy[id] {
		return fmt.Errorf("%w: another request writes to this upload", ociregistry.ErrBlobUploadInvalid)
	}
	s.busy[id] = true
	return nil
}

// release ends a claim, so that another request can claim the upload.
func (s *Store) release(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.busy, id)
}
