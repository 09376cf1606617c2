// Package cosbucket reads a COS release bucket or a bucket of NVIDIA runfiles. The bucket may be in Google Cloud
// Storage (gs://), on any web server (https://, http://), or in a folder (file://). The object names are the same
// everywhere. If one mirror of a bucket cannot be reached, the package uses another one.
//
// The package resumes a broken download if the object has not changed. At the end, it compares the download with the
// size, md5 and crc32c that the bucket reports.
//
// The package does not write. It sends credentials only to Google, and only if they are configured for this account. A
// caller that downloads an archive must compare it with the checksum that the bucket has beside it.
package cosbucket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/stall"
)

// Attrs are the attributes that a bucket reports for an object.
type Attrs struct {
	// Size is in bytes; -1 means unknown.
	Size int64
	// MD5 and CRC32C are in hex; "" means unknown.
	MD5, CRC32C string
	// URL is the URL from which the object was read. If the bucket has several mirrors, this is the URL on the mirror
	// that answered.
	URL string
	// pin identifies the object's version: the generation in Google Cloud Storage, the ETag on a web server. If pin is
	// empty, the download cannot be resumed on this mirror.
	pin string
}

// backend reads a bucket by one protocol. Object names are valid fs paths.
type backend interface {
	// open opens an object at an offset in bytes. If pin is not empty and the object has another version, the error is of
	// kind Transient.
	open(ctx context.Context, name string, offset int64, pin string) (io.ReadCloser, Attrs, error)
	// list returns the names of objects that begin with prefix.
	list(ctx context.Context, prefix string) ([]string, error)
	// folders returns the names of the top-level folders.
	folders(ctx context.Context) ([]string, error)
	// sibling opens another bucket by the same protocol, on the same server or in the same parent folder.
	sibling(ctx context.Context, bucket string) (backend, error)
	url(name string) string
	close() error
}

// maxListed is the maximum number of names in one listing. Google's driver bucket has tens of thousands.
const maxListed = 1 << 20

func tooMany() error {
	return fault.New(fault.Unsupported, fmt.Sprintf("the bucket's listing has more than %d objects", maxListed),
		"check the bucket's URL")
}

// Bucket is an open bucket. It is safe for concurrent use.
type Bucket struct {
	mirrors []backend
	// first is the index of the mirror that is tried first. After a failure of that mirror, it is the index of another
	// one.
	first atomic.Int32
	wait  time.Duration // time before the first retry of a broken download
}

// Open returns the bucket at a gs://, https://, http:// or file:// URL. A path after the bucket's name is a prefix of
// every object's name.
//
// Several URLs, separated by commas, are mirrors of one bucket. A call asks the next mirror only if a mirror cannot be
// reached. Later calls begin with the mirror that answered. If a mirror answers that an object does not exist, no other
// mirror is asked, and the error is of kind InputMissing.
func Open(ctx context.Context, rawURL string) (*Bucket, error) {
	return open(ctx, rawURL, retryWait)
}

func open(ctx context.Context, rawURL string, wait time.Duration) (_ *Bucket, err error) {
	all := &Bucket{wait: wait}
	defer func() {
		if err != nil {
			err = errors.Join(err, all.Close())
		}
	}()
	for _, one := range split(rawURL) {
		u, err := url.Parse(one)
		if err != nil {
			return nil, fault.Wrap(fault.Usage, fmt.Errorf("open bucket: %w", err),
				"write the bucket as gs://NAME, https://HOST/PATH or file:///FOLDER")
		}
		if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return nil, fault.New(fault.Usage,
				fmt.Sprintf("open bucket %s: want a URL without user, query and fragment", u.Redacted()),
				"remove user, query and fragment from the URL")
		}
		var b backend
		switch u.Scheme {
		case "gs":
			b, err = openGCS(ctx, u.Host, u.Path, wait)
		case "http", "https":
			b, err = openHTTP(u, wait)
		case "file":
			b, err = openFolder(u)
		default:
			return nil, fault.New(fault.Usage, fmt.Sprintf(
				"open bucket %q: want a URL that begins with gs://, https:// or file://", one),
				"write the bucket as gs://NAME, https://HOST/PATH or file:///FOLDER, and separate several mirrors of one bucket "+
					"with commas")
		}
		if err != nil {
			return nil, fmt.Errorf("open bucket %s: %w", one, err)
		}
		all.mirrors = append(all.mirrors, b)
	}
	return all, nil
}

var beginsURL = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9+.-]*://`)

// split splits a list of URLs at each comma before the beginning of a URL.
func split(list string) []string {
	var urls []string
	for part := range strings.SplitSeq(list, ",") {
		trimmed := strings.TrimSpace(part)
		if beginsURL.MatchString(trimmed) || len(urls) == 0 {
			urls = append(urls, trimmed)
		} else {
			urls[len(urls)-1] += "," + part
		}
	}
	return urls
}

// Close closes connections and folders.
func (b *Bucket) Close() error {
	var errs []error
	for _, m := range b.mirrors {
		errs = append(errs, m.close())
	}
	return errors.Join(errs...)
}

// URL returns the object's URL on the first mirror, for messages and for provenance.
func (b *Bucket) URL(name string) string { return b.mirrors[0].url(name) }

// tryMirrors passes one mirror after the other to the callback, until a mirror answers. A mirror that cannot list is
// skipped.
func (b *Bucket) tryMirrors(ctx context.Context, f func(m backend) error) error {
	var troubles, cannot []error
	start := int(b.first.Load())
	for i := range b.mirrors {
		at := (start + i) % len(b.mirrors)
		err := f(b.mirrors[at])
		switch {
		case errors.Is(err, errCannotList):
			cannot = append(cannot, err)
		case err == nil || !fault.Is(err, fault.Transient):
			if len(troubles) > 0 {
				b.prefer(at)
			}
			return err
		default:
			troubles = append(troubles, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return fault.Join(append(troubles, cannot...)...)
}

func (b *Bucket) prefer(at int) {
	b.first.Store(int32(at % len(b.mirrors))) //nolint:gosec // a list of URLs is short
}

// Get opens an object. If the object does not exist, the error is of kind InputMissing. After a transient error, Get
// tries again a few times, and then asks the next mirror. At the end of the stream, the reader compares the bytes with
// the size and the sums that the bucket reported. If size or sums differ, the last read returns an error of kind
// Checksum instead of io.EOF. If less than 64 KiB arrive within stallLimit, the read returns a transient error.
func (b *Bucket) Get(ctx context.Context, name string) (io.ReadCloser, Attrs, error) {
	if err := checkName(name); err != nil {
		return nil, Attrs{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	s := &stream{ctx: ctx, bucket: b, name: name}
	err := b.tryMirrors(ctx, func(m backend) (err error) {
		s.from = m
		if s.body, s.attrs, err = m.open(ctx, name, 0, ""); err != nil {
			return fmt.Errorf("fetch %s: %w", m.url(name), err)
		}
		s.attrs.URL = m.url(name)
		return nil
	})
	if err != nil {
		cancel()
		return nil, Attrs{}, err
	}
	s.check = newCheck(s.attrs)
	return stall.Watch(s, s.attrs.URL, stallLimit, cancel), s.attrs, nil
}

// stallLimit is the longest time that reads of 64 KiB may take together, including retries.
const stallLimit = 5 * time.Minute

// ReadSmall returns the content of an object of at most limit bytes.
func (b *Bucket) ReadSmall(ctx context.Context, name string, limit int64) ([]byte, error) {
	text, _, err := b.readSmall(ctx, name, limit)
	return text, err
}

// readSmall is like [Bucket.ReadSmall], and also returns the URL from which the object was read.
func (b *Bucket) readSmall(ctx context.Context, name string, limit int64) (text []byte, from string, err error) {
	r, attrs, err := b.Get(ctx, name)
	if err != nil {
		return nil, "", err
	}
	text, err = io.ReadAll(io.LimitReader(r, limit+1))
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, "", fmt.Errorf("fetch %s: %w", attrs.URL, err)
	}
	if int64(len(text)) > limit {
		return nil, "", fault.New(fault.Unsupported,
			fmt.Sprintf("fetch %s: the object has more than %d bytes", attrs.URL, limit),
			"check that the bucket holds COS builds")
	}
	return text, attrs.URL, nil
}

// checkName refuses every name that is not a relative path within the bucket.
func checkName(name string) error {
	if name == "." || !fs.ValidPath(name) || strings.ContainsAny(name, "\\\x00\r\n") {
		return fault.New(fault.Usage, fmt.Sprintf("object name %q: want a relative path without . and ..", name), "")
	}
	return nil
}

// missing returns the error for an object that does not exist.
func missing(cause error) error {
	return fault.Wrap(fault.InputMissing, cause, "check BUILD_ID, board and version, and the bucket's URL")
}
