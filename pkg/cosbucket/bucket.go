// Package cosbucket reads a COS release bucket or a bucket of NVIDIA runfiles,
// wherever it is: Google Cloud Storage (gs://), any web server (https://,
// http://), or a folder (file://), all with the same object names. Several
// mirrors of one bucket can stand in for each other.
//
// A download that breaks goes on where it broke, as long as the object is still
// the same; at its end it is compared with the size, md5 and crc32c that the
// bucket tells of the object.
//
// It refuses to write, to send credentials that nobody configured, and to
// judge an object's content beyond that and its small text files: who fetches
// an archive checks it against the sum beside it.
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

// Attrs is what a bucket says about an object.
type Attrs struct {
	// Size is in bytes; -1 is unknown.
	Size int64
	// MD5 and CRC32C are in hex; "" means unknown.
	MD5, CRC32C string
	// URL is where the object came from: of several mirrors, the one that had it.
	URL string
	// pin names this very object among those that ever had its name; "" means unknown, and then a download cannot be
	// resumed here.
	pin string
}

// backend is one way to reach a bucket. Names are valid fs paths.
type backend interface {
	// open opens an object from an offset on. With a pin, another object of that
	// name is a transient error.
	open(ctx context.Context, name string, offset int64, pin string) (io.ReadCloser, Attrs, error)
	// list returns the names of objects that begin with prefix.
	list(ctx context.Context, prefix string) ([]string, error)
	// folders returns what comes before the first slash of names.
	folders(ctx context.Context) ([]string, error)
	// sibling opens the bucket of another name that is reached the same way.
	sibling(ctx context.Context, bucket string) (backend, error)
	url(name string) string
	close() error
}

// maxListed bounds what a bucket may list; Google's driver bucket has tens of
// thousands of names.
const maxListed = 1 << 20

func tooMany() error {
	return fault.New(fault.Unsupported, fmt.Sprintf("more than %d names", maxListed), "check the bucket's URL")
}

// Bucket is an open bucket. It is safe for concurrent use.
type Bucket struct {
	mirrors []backend
	// first is the mirror that is asked first: the last one that answered after
	// another did not.
	first atomic.Int32
	wait  time.Duration // before the first resumption
}

// Open returns the bucket at a gs://, https://, http:// or file:// URL. A path
// behind the bucket's name is put before every object's name.
//
// Several URLs with commas between them are mirrors of one bucket. They are
// asked in this order, the next one only when one cannot be reached: what a
// mirror does not have does not exist, and what is damaged there stays an
// error.
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
				"name a bucket as gs://NAME, https://HOST/PATH or file:///FOLDER")
		}
		if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return nil, fault.New(fault.Usage,
				fmt.Sprintf("open bucket %s: user, query and fragment have no place in a bucket's URL", u.Redacted()),
				"leave them out")
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
			return nil, fault.New(fault.Usage, fmt.Sprintf("open bucket %q: unknown kind of URL", one),
				"name a bucket as gs://NAME, https://HOST/PATH or file:///FOLDER, several mirrors of it with commas between them")
		}
		if err != nil {
			return nil, fmt.Errorf("open bucket %s: %w", one, err)
		}
		all.mirrors = append(all.mirrors, b)
	}
	return all, nil
}

var beginsURL = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9+.-]*://`)

// split cuts a list of URLs at the commas that a URL begins behind.
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

// Close lets go of connections and folders.
func (b *Bucket) Close() error {
	var errs []error
	for _, m := range b.mirrors {
		errs = append(errs, m.close())
	}
	return errors.Join(errs...)
}

// URL returns the object's URL, for people and for provenance. Of several
// mirrors it is the first; [Attrs] tell which one had an object.
func (b *Bucket) URL(name string) string { return b.mirrors[0].url(name) }

// each asks the mirrors, one after the other, until one answers.
func (b *Bucket) each(ctx context.Context, ask func(m backend) error) error {
	var troubles, cannot []error
	start := int(b.first.Load())
	for i := range b.mirrors {
		at := (start + i) % len(b.mirrors)
		err := ask(b.mirrors[at])
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
	return inOneLine(append(troubles, cannot...))
}

// inOneLine is errors.Join for what people read as one sentence.
func inOneLine(errs []error) error {
	all := errs[0]
	for _, err := range errs[1:] {
		all = fmt.Errorf("%w; %w", all, err)
	}
	return all
}

func (b *Bucket) prefer(at int) {
	b.first.Store(int32(at % len(b.mirrors))) //nolint:gosec // a list of URLs is short
}

// Get opens an object. The error is a fault.InputMissing when there is none;
// a transient error is retried a few times first, and then at the next mirror.
// At its end the stream is checked against what the bucket says of the object:
// its last read gives a fault.Checksum instead of io.EOF. It breaks, as
// a transient error, when nothing comes for minutes.
func (b *Bucket) Get(ctx context.Context, name string) (io.ReadCloser, Attrs, error) {
	if err := checkName(name); err != nil {
		return nil, Attrs{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	s := &stream{ctx: ctx, bucket: b, name: name}
	err := b.each(ctx, func(m backend) (err error) {
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

// stallLimit is how long one read of a download may take, resumptions included.
const stallLimit = 5 * time.Minute

// ReadSmall returns the content of an object of at most limit bytes.
func (b *Bucket) ReadSmall(ctx context.Context, name string, limit int64) ([]byte, error) {
	r, attrs, err := b.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, fmt.Errorf("fetch %s: %w", attrs.URL, err)
	}
	if int64(len(text)) > limit {
		return nil, fault.New(fault.Unsupported, fmt.Sprintf("fetch %s: more than %d bytes", attrs.URL, limit),
			"check that the bucket holds COS builds")
	}
	return text, nil
}

// checkName refuses names that mean anything but an object below the bucket.
func checkName(name string) error {
	if name == "." || !fs.ValidPath(name) || strings.ContainsAny(name, "\\\x00\r\n") {
		return fault.New(fault.Usage, fmt.Sprintf("object name %q: want a relative path without . and ..", name), "")
	}
	return nil
}

// missing is the error for an object that is not there.
func missing(cause error) error {
	return fault.Wrap(fault.InputMissing, cause, "check BUILD_ID, board and version, and the bucket's URL")
}
