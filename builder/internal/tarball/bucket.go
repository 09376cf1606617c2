package tarball

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"

	"github.com/prebake/prebake/pkg/fault"
)

// attrs are the attributes of an object in a destination.
type attrs struct {
	size int64
	// md5 is in hex; "" means unknown.
	md5 string
}

// upload is an object to create.
type upload struct {
	name, contentType string
	cacheControl      string // "" means the destination's default
	size              int64
	md5               [16]byte
	crc32c            uint32
	open              func() (io.ReadCloser, error)
}

// store is one kind of destination. Object names are slash-separated and relative to the
// destination.
type store interface {
	// stat returns an object's attributes; ok is false if there is no object.
	stat(ctx context.Context, name string) (a attrs, ok bool, err error)
	// open opens an object for reading; the error is errAbsent if there is no object. The token identifies the state of
	// the object that is read.
	open(ctx context.Context, name string) (rc io.ReadCloser, token string, err error)
	// create stores a whole object or nothing; the error is errExists if the name is taken.
	create(ctx context.Context, u upload) error
	// replace replaces the object if it is still in the token's state; the error is errChanged
	// otherwise. The token "" stands for no object.
	replace(ctx context.Context, u upload, token string) error
	// remove removes the object if it is still in the token's state; the error is errChanged
	// otherwise. An object that is already gone is no error.
	remove(ctx context.Context, name, token string) error
	url(name string) string
	close() error
}

var (
	errAbsent  = errors.New("no such object")
	errExists  = errors.New("an object of this name exists already")
	errChanged = errors.New("another writer changed the object after it was read")
)

// Bucket is an open destination: a bucket of Google Cloud Storage or a folder.
type Bucket struct{ s store }

// Open returns the destination at gs://BUCKET/PREFIX or file:///FOLDER. The bucket must exist. If the folder does not
// exist, Open creates it. If the environment variable STORAGE_EMULATOR_HOST names a server, Open uses that server for
// gs://, as Google's own clients do.
func Open(ctx context.Context, dest string) (*Bucket, error) {
	u, err := parse(dest)
	if err != nil {
		return nil, err
	}
	var s store
	if u.Scheme == "gs" {
		s, err = openGCS(ctx, u)
	} else {
		s, err = openFolder(u, (*os.File).Sync)
	}
	if err != nil {
		return nil, fmt.Errorf("open destination %s: %w", dest, err)
	}
	return &Bucket{s}, nil
}

// parse returns the URL of a destination: gs:// or file://.
func parse(dest string) (*url.URL, error) {
	const hint = "name the destination gs://BUCKET/PREFIX or file:///FOLDER"
	u, err := url.Parse(dest)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("open destination: %w", err), hint)
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fault.New(fault.Usage,
			fmt.Sprintf("open destination %s: want a URL without user, query and fragment", u.Redacted()), hint)
	}
	if u.Scheme != "gs" && u.Scheme != "file" {
		return nil, fault.New(fault.Usage, fmt.Sprintf("open destination %q: neither gs:// nor file://", dest), hint)
	}
	return u, nil
}

// Is reports whether a destination's name belongs to [Open]. Other names are OCI repositories.
func Is(dest string) bool {
	u, err := url.Parse(dest)
	return err == nil && (u.Scheme == "gs" || u.Scheme == "file")
}

// Close closes connections and folders.
func (b *Bucket) Close() error { return b.s.close() }

// URL returns an object's URL.
func (b *Bucket) URL(name string) string { return b.s.url(name) }

// small reads an object of at most limit bytes. data is nil if there is no object.
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
		return nil, "", fault.Errorf(fault.PublishRefused, "read %s: the object has more than %d bytes", b.URL(name), limit)
	}
	if data == nil {
		data = []byte{}
	}
	return data, token, nil
}

// tries limits the attempts to change one object. Only a change by another writer leads to a new
// attempt.
const tries = 256

// update changes an object. It calls change with the object's present bytes, or with nil if there is no object, and
// writes what change returns. Before each write, update calls before with the new bytes. If another writer changes the
// object in between, update starts again. If change returns the present bytes, update writes nothing and changed is
// false. data are the object's bytes after the call.
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
			return false, nil, fault.Errorf(fault.PublishRefused,
				"update %s: the object would have %d bytes; readers accept at most %d", b.URL(name), len(want), limit)
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

// remove removes an object if such returns true for its bytes, and reports whether it removed the object. If another
// writer changes the object in between, remove starts again.
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
	return fault.New(fault.Transient,
		fmt.Sprintf("%s %s: other writers changed the object during each of %d attempts", verb, url, tries),
		"run the command again when fewer builders publish for this COS build")
}
