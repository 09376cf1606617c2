package tarball

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"

	"github.com/prebake/prebake/pkg/fault"
)

// attrs is what a destination says about an object.
type attrs struct {
	size int64
	// md5 is in hex; "" means unknown.
	md5 string
}

// upload is an object that is about to be created.
type upload struct {
	name, contentType string
	cacheControl      string // "" is the destination's own rule
	size              int64
	md5               [16]byte
	crc32c            uint32
	open              func() (io.ReadCloser, error)
}

// store is one kind of destination. Names are slash-separated and below it.
type store interface {
	// stat says what is there; ok is false where nothing is.
	stat(ctx context.Context, name string) (a attrs, ok bool, err error)
	// open reads an object; the error is errAbsent where none is. The token
	// names the very state that is read.
	open(ctx context.Context, name string) (rc io.ReadCloser, token string, err error)
	// create stores a whole object or none; the error is errExists where there
	// is one of this name.
	create(ctx context.Context, u upload) error
	// replace puts data in place of the state that the token names, "" for
	// none; the error is errChanged where another state is there.
	replace(ctx context.Context, u upload, token string) error
	// remove removes the state that the token names; the error is errChanged
	// where another state is there. One that is gone is no error.
	remove(ctx context.Context, name, token string) error
	url(name string) string
	close() error
}

var (
	errAbsent  = errors.New("no such object")
	errExists  = errors.New("there is an object of this name")
	errChanged = errors.New("another writer changed the object meanwhile")
)

// Bucket is an open destination.
type Bucket struct{ s store }

// Open returns the destination at gs://BUCKET/PREFIX or file:///FOLDER. The
// bucket has to be there; a folder is made when something is first written.
// STORAGE_EMULATOR_HOST redirects gs://, as it does every client of Google's.
func Open(ctx context.Context, dest string) (*Bucket, error) {
	const hint = "name it gs://BUCKET/PREFIX, or file:///FOLDER"
	u, err := url.Parse(dest)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("open destination: %w", err), hint)
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fault.New(fault.Usage,
			fmt.Sprintf("open destination %s: user, query and fragment have no place in it", u.Redacted()), hint)
	}
	var s store
	switch u.Scheme {
	case "gs":
		s, err = openGCS(ctx, u)
	case "file":
		s, err = openFolder(u)
	default:
		return nil, fault.New(fault.Usage, fmt.Sprintf("open destination %q: not a bucket", dest), hint)
	}
	if err != nil {
		return nil, fmt.Errorf("open destination %s: %w", dest, err)
	}
	return &Bucket{s}, nil
}

// Is reports whether a destination's name is one for [Open] rather than that of
// an OCI repository.
func Is(dest string) bool {
	u, err := url.Parse(dest)
	return err == nil && (u.Scheme == "gs" || u.Scheme == "file")
}

// Close lets go of connections and folders.
func (b *Bucket) Close() error { return b.s.close() }

// URL returns an object's URL.
func (b *Bucket) URL(name string) string { return b.s.url(name) }

// small reads an object of at most limit bytes; absent is nil data.
func (b *Bucket) small(ctx context.Context, name string, limit int64) (data []byte, token string, err error) {
	rc, token, err := b.s.open(ctx, name)
	if errors.Is(err, errAbsent) {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", fmt.Errorf("read %s: %w", b.URL(name), err)
	}
	data, err = io.ReadAll(io.LimitReader(rc, limit+1))
	if err = errors.Join(err, rc.Close()); err != nil {
		return nil, "", fmt.Errorf("read %s: %w", b.URL(name), err)
	}
	if int64(len(data)) > limit {
		return nil, "", fault.Errorf(fault.PublishRefused, "read %s: more than %d bytes", b.URL(name), limit)
	}
	if data == nil {
		data = []byte{}
	}
	return data, token, nil
}

// tries bounds how often one change of an object is tried. Somebody else's
// success is the only reason for another one.
const tries = 256

// update changes an object by what change makes of its bytes, nil where there
// is none, and by nobody else's leave: what another writer wrote meanwhile is read again.
// before is called with new bytes right before they are to be seen. Equal
// bytes change nothing.
func (b *Bucket) update(ctx context.Context, name, contentType string, limit int64,
	change func(have []byte) ([]byte, error), before func(data []byte) error) (changed bool, data []byte, err error) {
	for range tries {
		have, token, err := b.small(ctx, name, limit)
		if err != nil {
			return false, nil, err
		}
		want, err := change(have)
		if err != nil {
			return false, nil, fmt.Errorf("update %s: %w", b.URL(name), err)
		}
		if have != nil && string(have) == string(want) {
			return false, want, nil
		}
		if int64(len(want)) > limit {
			return false, nil, fault.Errorf(fault.PublishRefused, "update %s: it would have %d bytes; at most %d are read",
				b.URL(name), len(want), limit)
		}
		if err := before(want); err != nil {
			return false, nil, err
		}
		err = b.s.replace(ctx, bytesObject(name, contentType, want).upload, token)
		if err == nil {
			return true, want, nil
		}
		if !errors.Is(err, errChanged) {
			return false, nil, fmt.Errorf("update %s: %w", b.URL(name), err)
		}
	}
	return false, nil, busy("update", b.URL(name))
}

// remove removes an object if its bytes are such as to be removed, and by
// nobody else's leave.
func (b *Bucket) remove(ctx context.Context, name string, limit int64, such func(have []byte) bool) (bool, error) {
	for range tries {
		have, token, err := b.small(ctx, name, limit)
		if err != nil || have == nil || !such(have) {
			return false, err
		}
		switch err = b.s.remove(ctx, name, token); {
		case err == nil:
			return true, nil
		case !errors.Is(err, errChanged):
			return false, fmt.Errorf("remove %s: %w", b.URL(name), err)
		}
	}
	return false, busy("remove", b.URL(name))
}

func busy(verb, url string) error {
	return fault.New(fault.Transient, fmt.Sprintf("%s %s: others changed it %d times meanwhile", verb, url, tries),
		"try again later")
}
