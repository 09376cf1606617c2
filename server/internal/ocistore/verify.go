package ocistore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"strings"
	"time"

	"cuelabs.dev/go/oci/ociregistry"
	"github.com/opencontainers/go-digest"
)

// verifyEvery is the minimum time between the beginnings of two passes over all blobs. While a pass runs, its place is
// stored every placeEvery. Opening a file counts as reading openCost bytes, so that many small blobs do not keep the
// disk busy.
const (
	verifyEvery = 30 * 24 * time.Hour
	placeEvery  = time.Minute
	openCost    = 64 << 10
	readAtOnce  = 256 << 10
	placeFile   = "verified"
)

// Damage is a blob or a manifest whose content is damaged or lost. Its content was moved to the folder damaged, so that
// a push brings it back.
type Damage struct {
	Digest string
	// Manifest is one manifest that needs the content, as REPOSITORY@DIGEST, or "" if none does. Manifests is the number
	// of all of them.
	Manifest  string
	Manifests int
	// Cause is what was wrong with the content. nil means that it is known to be damaged or lost since earlier.
	Cause error
}

// Verified is what one pass over all blobs read.
type Verified struct {
	Blobs, Damaged int
	Bytes          int64
}

// place says how far a pass over all blobs has come.
type place struct {
	// Began is when the pass began.
	Began time.Time `json:"began"`
	// After is the path of the last blob that was verified. "" means that the pass has ended.
	After string `json:"after,omitempty"`
}

// readPlace returns the stored place. It returns the zero value if there is none, or if its file is damaged.
func (s *Store) readPlace() (p place) {
	raw, err := s.root.ReadFile(placeFile)
	if err != nil || json.Unmarshal(raw, &p) != nil {
		return place{}
	}
	return p
}

// writePlace stores a place. It needs no free space beyond the reserve.
func (s *Store) writePlace(p place) error {
	raw, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return s.root.WriteFile(placeFile, raw, 0o640)
}

// NextPass returns when [Store.Verify] is due: in the past if a pass was interrupted, or if there was none.
func (s *Store) NextPass() time.Time {
	p := s.readPlace()
	if p.After != "" {
		return p.Began
	}
	return p.Began.Add(verifyEvery)
}

// Verify reads all blobs and manifests, at most rate bytes per second, and compares them with their digests. The rate
// must be positive. Verify continues an interrupted pass. It moves damaged and unreadable content to the folder
// damaged, and passes it to the callback. If two files in a row cannot be read, it leaves the second one where it is,
// and returns an error. Pushes and collections may run at the same time.
func (s *Store) Verify(ctx context.Context, rate int64, found func(Damage)) (out Verified, err error) {
	p := s.readPlace()
	if p.After == "" {
		p.Began = s.now()
	}
	stored, failing := s.now(), false
	err = fs.WalkDir(s.root.FS(), "blobs", func(name string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // a collection removed it
		case err != nil || ctx.Err() != nil:
			return errors.Join(err, ctx.Err())
		case e.IsDir() && name < p.After && !strings.HasPrefix(p.After, name+"/"):
			return fs.SkipDir
		case e.IsDir() || name <= p.After:
			return nil
		}
		n, cause, err := s.verifyBlob(ctx, name, rate, failing)
		if err != nil {
			return err
		}
		failing = isUnread(cause)
		out.Blobs++
		out.Bytes += n
		if cause != nil {
			out.Damaged++
			if err := s.report(ctx, path.Base(name), cause, found); err != nil {
				return err
			}
		}
		p.After = name
		if s.now().Sub(stored) < placeEvery {
			return nil
		}
		stored = s.now()
		return s.writePlace(p)
	})
	if err == nil {
		p.After = ""
	}
	if err == nil || p.After != "" { // otherwise this pass has no place yet, and the former one stays
		err = errors.Join(err, s.writePlace(p))
	}
	if err != nil {
		return out, fmt.Errorf("verify blobs: %w", err)
	}
	return out, nil
}

// wrongDigest is the error if content has another digest than its name says.
type wrongDigest struct{ seen digest.Digest }

func (e wrongDigest) Error() string { return "the content has digest " + string(e.seen) }

// verifyBlob reads a blob and returns the number of bytes that it read. If the content is damaged or cannot be read,
// verifyBlob reads it once more, because the memory or the cable may be at fault. After the second time, it moves the
// content to the folder damaged, and returns the cause. If failing is true, the file before this one could not be read.
// If this one cannot be read either, the whole disk may be away: then verifyBlob moves nothing, and returns an error.
func (s *Store) verifyBlob(ctx context.Context, name string, rate int64, failing bool) (n int64, cause, err error) {
	sum := path.Base(name)
	is := digest.NewDigestFromEncoded(algorithm(sum), sum)
	if is.Validate() != nil || blobPath(sum) != name {
		return 0, nil, nil // it is not a file of this package
	}
	var f fs.File
	defer func() {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	for range 2 {
		if f != nil {
			if err := f.Close(); err != nil {
				return n, nil, err
			}
		}
		f, err = s.openBlob(name)
		if errors.Is(err, fs.ErrNotExist) {
			return n, nil, nil // a collection removed it
		}
		if err != nil {
			return n, nil, err
		}
		var got int64
		got, cause, err = readBlob(ctx, f, is, rate)
		n += got
		if cause == nil || err != nil {
			return n, nil, err
		}
	}
	if failing && isUnread(cause) {
		return n, nil, fmt.Errorf("stop after two files that cannot be read: %w", cause)
	}
	moved, err := s.moveAside(f, is)
	if !moved {
		cause = nil // a push replaced it meanwhile, or a collection removed it
	}
	return n, cause, err
}

// isUnread reports whether content could not be read. Otherwise it is intact, or its digest is wrong.
func isUnread(cause error) bool { return cause != nil && !errors.As(cause, new(wrongDigest)) }

// readBlob reads an open file, at most rate bytes per second, and returns the number of bytes. The cause says why the
// content is not the one with the digest. The error is that of ctx.
func readBlob(ctx context.Context, r io.Reader, is digest.Digest, rate int64) (n int64, cause, err error) {
	if err := pause(ctx, openCost, rate); err != nil {
		return 0, nil, err
	}
	seen := is.Algorithm().Digester()
	buffer := make([]byte, readAtOnce)
	for {
		got, err := r.Read(buffer)
		_, _ = seen.Hash().Write(buffer[:got]) // never fails, see hash.Hash
		n += int64(got)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return n, err, nil
		}
		if err := pause(ctx, got, rate); err != nil {
			return n, nil, err
		}
	}
	if d := seen.Digest(); d != is {
		return n, wrongDigest{d}, nil
	}
	return n, nil, nil
}

// pause waits as long as reading n bytes may take.
func pause(ctx context.Context, n int, rate int64) error {
	wait := time.Duration(float64(n) / float64(rate) * float64(time.Second))
	if wait == 0 {
		return ctx.Err()
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// moveAside moves a damaged blob to the folder damaged, unless another file has its path now.
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
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.absent[d.Encoded()] = true
	return true, nil
}

// report passes a damaged blob to the callback.
func (s *Store) report(ctx context.Context, sum string, cause error, found func(Damage)) error {
	all, err := s.damages(ctx, map[string]bool{sum: true})
	for _, d := range all {
		d.Cause = cause
		found(d)
	}
	return err
}

// damages returns the damage of absent blobs, which are given by their hex digits.
func (s *Store) damages(ctx context.Context, absent map[string]bool) (all []Damage, err error) {
	if len(absent) == 0 {
		return nil, nil
	}
	of := map[string]*Damage{}
	for sum := range absent {
		all = append(all, Damage{Digest: string(digest.NewDigestFromEncoded(algorithm(sum), sum))})
	}
	for i := range all {
		of[digest.Digest(all[i].Digest).Encoded()] = &all[i]
	}
	err = s.eachManifest(ctx, func(repo string, is digest.Digest) error {
		needs := []string{is.Encoded()}
		content, err := s.root.ReadFile(blobPath(is.Encoded()))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
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
	return all, err
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
		return false, nil //nolint:nilerr // it is known to be damaged
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

// readAbsent notes the content that was damaged before the start.
func (s *Store) readAbsent() error {
	entries, err := fs.ReadDir(s.root.FS(), "damaged")
	for _, e := range entries {
		s.absent[e.Name()] = true
	}
	return err
}

// Damaged returns the number of blobs and manifests that are known to be damaged or lost, and were not pushed since
// then.
func (s *Store) Damaged() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for sum := range s.absent {
		if s.isAbsent(sum) {
			n++
		}
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
