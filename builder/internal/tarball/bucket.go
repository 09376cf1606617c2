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

// store is one kind of destination. Object names are slash-separated and relative to the destination.
type store interface {
	// stat returns an object's attributes; ok is false if there is no object.
	stat(ctx context.Context, name string) (a attrs, ok bool, err error)
	// open opens an object for reading. If there is no object, the error is errAbsent. The token identifies the object's
	// state.
	open(ctx context.Context, name string) (rc io.ReadCloser, token string, err error)
	// create stores a whole object or nothing. If the name is taken, the error is errExists.
	create(ctx context.Context, u upload) error
	// replace replaces the object if it is still in the state of the token. Otherwise the error is errChanged. The token
	// "" means that there must be no object.
	replace(ctx context.Context, u upload, token string) error
	// remove removes the object if it is still in the state of the token. Otherwise the error is errChanged. A missing
	// object is no error.
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

// Open returns the destination at gs://BUCKET/PREFIX or file:///FOLDER. The bucket must exist; Open creates a missing
// folder. As with Google's own clients, the environment variable STORAGE_EMULATOR_HOST names another server for gs://.
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
	const hint = "give the destination as gs://BUCKET/PREFIX or file:///FOLDER"
	u, err := url.Parse(dest)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("open destination: %w", err), hint)
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fault.New(fault.Usage,
			fmt.Sprintf("open destination %s: want a URL without user, query and fragment", u.Redacted()), hint)
	}
	if u.Scheme != "gs" && u.Scheme != "file" {
		return nil, fault.New(fault.Usage,
			fmt.Sprintf("open destination %q: the URL begins neither with gs:// nor with file://", dest), hint)
	}
	return u, nil
}

// Is reports whether dest is a destination for [Open]. Any other destination is an OCI repository.
func Is(dest string) bool {
	u, err := url.Parse(dest)
	return err == nil && (u.Scheme == "gs" || u.Scheme == "file")
}

// Close closes the connections or the folder of the destination.
func (b *Bucket) Close() error { return b.s.close() }

// URL returns an object's URL.
func (b *Bucket) URL(name string) string { return b.s.url(name) }

// readSmall reads a whole object of at most limit bytes. If the object does not exist, data is nil.
func (b *Bucket) readSmall(ctx context.Context, name string, limit int64) (data []byte, token string, err error) {
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

// maxTries is the maximum number of attempts to change one object while other writers change it.
const maxTries = 256

// update changes the content of an object. The first callback gets the present content, or nil, and returns the new
// content. If both are equal, update writes nothing, and changed is false. The second callback runs before each write.
// If another writer changes the object in between, update starts again. data is the content after the call.
func (b *Bucket) update(ctx context.Context, name, contentType string, limit int64,
	next func(have []byte) ([]byte, error), prepare func(data []byte) error) (changed bool, data []byte, err error) {
	for range maxTries {
		have, token, err := b.readSmall(ctx, name, limit)
		if err != nil {
			return false, nil, err
		}
		want, err := next(have)
		if err != nil {
			return false, nil, fmt.Errorf("update %s: %w", b.URL(name), err)
		}
		if have != nil && string(have) == string(want) {
			return false, want, nil
		}
		if int64(len(want)) > limit {
			return false, nil, fault.Errorf(fault.PublishRefused,
				"update %s: the object would have %d bytes; readers accept at most %d bytes", b.URL(name), len(want), limit)
		}
		if err := prepare(want); err != nil {
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

// remove removes an object if its content matches, and reports whether it did. If another writer changes the object in
// between, remove starts again.
func (b *Bucket) remove(ctx context.Context, name string, limit int64, matches func(have []byte) bool) (bool, error) {
	for range maxTries {
		have, token, err := b.readSmall(ctx, name, limit)
		if err != nil || have == nil || !matches(have) {
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
		fmt.Sprintf("%s %s: other writers changed the object during each of %d attempts", verb, url, maxTries),
		"run the command again when fewer builders publish for this COS build")
}
