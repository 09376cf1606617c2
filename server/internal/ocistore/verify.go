package ocistore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// verifyEvery is the minimum time between the beginnings of two passes over all blobs. While a pass runs, it stores
// every placeEvery how far it has come. Opening a file counts as reading openCost bytes, so that many small blobs do
// not keep the disk busy. A pass keeps about cachedAtMost bytes of the blob that it reads in the page cache.
const (
	verifyEvery  = 30 * 24 * time.Hour
	placeEvery   = time.Minute
	openCost     = 64 << 10
	readAtOnce   = 256 << 10
	cachedAtMost = 8 << 20
	placeFile    = "verified"
)

// Damage is a blob or a manifest whose content is damaged or lost. Its content was moved to the folder damaged, so that
// a push brings it back.
type Damage struct {
	Digest string
	// Manifest is one manifest that needs the content, as REPOSITORY@DIGEST, or "" if none does. Manifests is the number
	// of all of them.
	Manifest  string
	Manifests int
	// Cause is what was wrong with the content. nil means that the damage or loss was known already.
	Cause error
	// Kept is the path of a file or a folder that could not be read or moved, and stays where it is. Digest is "" then.
	// Otherwise Kept is "".
	Kept string
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
	// Kept has the paths of files and folders that could not be read or moved.
	Kept []string `json:"kept,omitempty"`
}

// readPlace returns the stored place. It returns the zero value if no place is stored, or if the file is damaged.
func (s *Store) readPlace() (p place) {
	raw, err := s.root.ReadFile(placeFile)
	if err != nil || json.Unmarshal(raw, &p) != nil {
		return place{}
	}
	return p
}

// writePlace stores a place, and the paths of what was kept, atomically. It needs no free space beyond the reserve.
func (s *Store) writePlace(p place) error {
	s.mu.Lock()
	p.Kept = slices.Sorted(maps.Keys(s.kept))
	s.mu.Unlock()
	raw, err := json.Marshal(p)
	if err != nil {
		return err
	}
	name := "tmp/" + randomID()
	f, err := s.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = s.root.Rename(name, placeFile)
	}
	if err != nil {
		return errors.Join(err, s.root.Remove(name))
	}
	return nil
}

// NextPass returns when [Store.Verify] is due: in the past if a pass was interrupted, if it could not read something,
// or if there was none.
func (s *Store) NextPass() time.Time {
	p := s.readPlace()
	if p.After != "" || len(p.Kept) > 0 {
		return p.Began
	}
	return p.Began.Add(verifyEvery)
}

// pass is one call of Verify.
type pass struct {
	*Store
	rate  int64
	found func(Damage)
	out   Verified
	place place
	// before has the paths that could not be read or moved before this call.
	before map[string]bool
	// again is true while only the paths are read that could not be read or moved before this call.
	again bool
	// stored is when the place was stored.
	stored time.Time
	// failing is true if the file before this one could not be read.
	failing bool
	// damaged has what was wrong with moved content that is not reported yet, by the content's hex digits.
	damaged map[string]error
	// kept has the errors about what could not be read or moved, at most maxKept of them. more is the number of the
	// others.
	kept []error
	more int
}

// maxKept is how many unreadable files and folders the error of Verify names. With maxUnread of them, a pass ends at
// the next file and does not note it: they have one cause, such as a wrong owner of all files.
const (
	maxKept   = 10
	maxUnread = 1000
)

// Verify reads all blobs and manifests, at most rate bytes per second, and compares them with their digests. The rate
// must be positive. Verify continues an interrupted pass. It moves damaged and unreadable content to the folder
// damaged. It reports this content by calls of the function found, at the end and each time that it stores its place.
//
// Files and folders that it cannot open or move stay where they are. For each of them, Verify calls the function found
// once, and not again in later calls. It goes on, and returns an error at the end. Until the next pass is due, it reads
// only these again. If two files in a row cannot be read, or more than maxUnread cannot be opened or moved, Verify ends
// there with an error. With maxUnread of them, the next call first reads these again, and then goes on. Pushes and
// collections may run at the same time.
func (s *Store) Verify(ctx context.Context, rate int64, found func(Damage)) (Verified, error) {
	p := &pass{Store: s, rate: rate, found: found, place: s.readPlace(), damaged: map[string]error{}}
	if err := p.run(ctx); err != nil {
		return p.out, fmt.Errorf("verify blobs: %w", err)
	}
	return p.out, nil
}

func (p *pass) run(ctx context.Context) error {
	p.before = map[string]bool{}
	for _, name := range p.place.Kept {
		p.before[name] = true
	}
	now := p.now()
	p.stored = now
	due := p.place.After != "" || len(p.place.Kept) == 0 || !now.Before(p.place.Began.Add(verifyEvery))
	var err error
	if !due || len(p.place.Kept) >= maxUnread { // what was repaired makes room for others
		p.again = true
		err = p.walk(ctx, p.place.Kept...)
		p.again = false
	}
	if due && err == nil {
		err = p.readAll(ctx, now)
	}
	p.report(ctx)
	err = errors.Join(err, p.writePlace(p.place))
	if p.more > 0 {
		p.kept = append(p.kept, fmt.Errorf("%d more files and folders cannot be read or moved", p.more))
	}
	return errors.Join(append(p.kept, err)...)
}

// readAll verifies all blobs from the place on. A pass that begins is one of this time.
func (p *pass) readAll(ctx context.Context, now time.Time) error {
	former := p.place.Began
	if p.place.After == "" {
		p.place.Began = now
		p.kept, p.more = nil, 0 // all paths are read again
	}
	err := p.walk(ctx, "blobs")
	switch {
	case err == nil:
		p.place.After = ""
	case p.place.After == "":
		p.place.Began = former // no blob was verified, so the next call begins the pass
	}
	return err
}

// walk verifies the blobs at and below these paths.
func (p *pass) walk(ctx context.Context, roots ...string) error {
	for _, root := range roots {
		p.failing = false
		err := fs.WalkDir(p.root.FS(), root, func(name string, e fs.DirEntry, err error) error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if done, err := p.skip(name, e, err); done {
				return err
			}
			if err := p.visit(ctx, name); err != nil {
				return err
			}
			if !p.again {
				p.place.After = name
			}
			if p.now().Sub(p.stored) < placeEvery {
				return nil
			}
			p.stored = p.now()
			p.report(ctx)
			return p.writePlace(p.place)
		})
		if err != nil && p.again {
			p.mu.Lock()
			p.Store.kept[root] = true // it may be a folder of which a part was not read
			p.mu.Unlock()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// skip reports whether there is nothing to read at a path, and what the walk must return then.
func (p *pass) skip(name string, e fs.DirEntry, err error) (done bool, next error) {
	after := p.place.After
	if p.again {
		after = ""
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		p.keep(name, nil) // a collection removed it
		return true, nil
	case err != nil:
		p.keep(name, err)
		return true, nil
	case e.IsDir() && name < after && !strings.HasPrefix(after, name+"/"):
		return true, fs.SkipDir
	case e.IsDir():
		p.keep(name, nil) // if it cannot be listed, skip is called again
		return true, nil
	}
	return name <= after, nil
}

// visit verifies one blob.
func (p *pass) visit(ctx context.Context, name string) error {
	n, cause, kept, err := p.verifyBlob(ctx, name, p.rate, p.failing)
	p.out.Bytes += n
	if err != nil {
		return err
	}
	p.out.Blobs++
	if kept != nil && !p.before[name] && p.keptPaths() >= maxUnread {
		return fmt.Errorf("stop after %d files and folders that cannot be read or moved: %w", maxUnread, kept)
	}
	p.keep(name, kept)
	if kept == nil || cause != nil { // a file that cannot be opened says nothing about the next one
		p.failing = isUnread(cause)
	}
	if cause == nil || kept != nil {
		return nil
	}
	p.out.Damaged++
	p.damaged[path.Base(name)] = cause
	return nil
}

// keep notes why a file or a folder could not be read or moved. If cause is nil, keep forgets the file or folder.
func (p *pass) keep(name string, cause error) {
	p.mu.Lock()
	if cause == nil {
		delete(p.Store.kept, name)
	} else {
		p.Store.kept[name] = true
	}
	p.mu.Unlock()
	if cause == nil {
		return
	}
	p.fail(cause)
	if !p.before[name] {
		p.found(Damage{Kept: name, Cause: cause})
	}
}

// keptPaths returns the number of paths that cannot be read or moved.
func (p *pass) keptPaths() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.Store.kept)
}

// fail notes an error that does not end the pass.
func (p *pass) fail(err error) {
	if len(p.kept) < maxKept {
		p.kept = append(p.kept, err)
	} else {
		p.more++
	}
}

// report calls found for the damaged content that is not reported yet. It reads all manifests only once for this. If
// ctx has ended, report does nothing: the next collection reports the content.
func (p *pass) report(ctx context.Context) {
	if len(p.damaged) == 0 || ctx.Err() != nil {
		return
	}
	absent := map[string]bool{}
	for sum := range p.damaged {
		absent[sum] = true
	}
	all, err := p.damages(ctx, absent)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		p.fail(fmt.Errorf("read manifests: %w", err))
	}
	for _, d := range all {
		sum := digest.Digest(d.Digest).Encoded()
		if err == nil && d.Manifests == 0 { // nobody needs to repair it, so it does not count
			p.mu.Lock()
			delete(p.absent, sum)
			p.mu.Unlock()
		}
		d.Cause = p.damaged[sum]
		p.found(d)
	}
	clear(p.damaged)
}

// wrongDigest is the error if content has another digest than its name says.
type wrongDigest struct{ seen digest.Digest }

func (e wrongDigest) Error() string { return "the content has digest " + string(e.seen) }

// verifyBlob reads a blob and returns the number of bytes that it read. If the content is damaged or cannot be read,
// verifyBlob reads it once more, because the memory or the cable may be at fault. After the second time, it moves the
// content to the folder damaged, and returns the cause. If it cannot open or move the file, kept says why.
//
// If failing is true, the file before this one could not be read. If this one cannot be read either, the whole disk may
// be away: then verifyBlob moves nothing, and returns an error.
func (s *Store) verifyBlob(
	ctx context.Context,
	name string,
	rate int64,
	failing bool,
) (n int64, cause, kept, err error) {
	sum := path.Base(name)
	is := digest.NewDigestFromEncoded(algorithm(sum), sum)
	if is.Validate() != nil || blobPath(sum) != name {
		return 0, nil, nil, nil // it is not a file of this package
	}
	var f fs.File // it stays open until the move, so that no other file gets its inode number
	defer func() {
		if f != nil {
			_ = f.Close()
		}
	}()
	for range 2 {
		if err := pause(ctx, openCost, rate); err != nil {
			return n, nil, nil, err
		}
		if f != nil {
			_ = f.Close()
			f = nil
		}
		opened, oerr := s.openBlob(name)
		if errors.Is(oerr, fs.ErrNotExist) {
			return n, nil, nil, nil // a collection removed it
		}
		if cause = oerr; oerr != nil {
			continue
		}
		f = opened
		var got int64
		got, cause, err = readBlob(ctx, f, is, rate)
		n += got
		if cause == nil || err != nil {
			return n, nil, nil, err
		}
	}
	switch {
	case failing && isUnread(cause):
		return n, nil, nil, fmt.Errorf("stop after two files that cannot be read: %w", cause)
	case f == nil:
		return n, nil, cause, nil
	}
	moved, err := s.moveAside(f, is)
	if err != nil {
		return n, cause, fmt.Errorf("move the damaged file %s aside: %w", name, errors.Join(cause, err)), nil
	}
	if !moved {
		cause = nil // a push replaced it meanwhile, or a collection removed it
	}
	return n, cause, nil, nil
}

// isUnread reports whether content could not be read. If not, the content is intact, or its digest is wrong.
func isUnread(cause error) bool { return cause != nil && !errors.As(cause, new(wrongDigest)) }

// readBlob reads an open file, at most rate bytes per second, and returns the number of bytes. The cause is a read
// error, or says that the content has another digest. The error is that of ctx.
//
// readBlob reads from the disk and not from the page cache, because the cache may still have an intact copy of content
// that is damaged on the disk. Afterwards it removes the content from the cache: the database needs that memory more.
func readBlob(ctx context.Context, r io.Reader, is digest.Digest, rate int64) (n int64, cause, err error) {
	seen := is.Algorithm().Digester()
	buffer := make([]byte, readAtOnce)
	uncache(r, 0, 0)
	dropped := int64(0)
	defer func() { uncache(r, dropped, 0) }()
	for {
		got, err := r.Read(buffer)
		_, _ = seen.Hash().Write(buffer[:got]) // never fails, see hash.Hash
		if n += int64(got); n-dropped >= cachedAtMost {
			uncache(r, dropped, n-dropped)
			dropped = n
		}
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

// uncache removes n bytes of a file from the page cache, from an offset on; with n = 0, all to the end. The kernel
// keeps what is not written to the disk yet, and what a process has mapped. uncache does nothing with a reader that is
// not a file.
func uncache(r io.Reader, from, n int64) {
	f, ok := r.(*os.File)
	if !ok {
		return
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return // the file is closed, and its reader gets the same error
	}
	// Errors do not matter, because this is only advice. Some file systems do not support it.
	_ = conn.Control(func(fd uintptr) { _ = unix.Fadvise(int(fd), from, n, unix.FADV_DONTNEED) })
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
