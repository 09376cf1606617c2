// Package cosbucket reads a COS release bucket or a bucket of NVIDIA runfiles,
// wherever it is: Google Cloud Storage (gs://), any web server (https://,
// http://), or a folder (file://), all with the same object names.
//
// It refuses to write, to send credentials that nobody configured, and to
// judge an object's content beyond its small text files: who fetches an archive
// checks it against the sum beside it.
package cosbucket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Attrs is what a bucket says about an object.
type Attrs struct {
	// Size is in bytes; -1 is unknown.
	Size int64
	// MD5 is in hex; "" is unknown.
	MD5 string
}

// backend is one way to reach a bucket. Names are valid fs paths.
type backend interface {
	get(ctx context.Context, name string) (io.ReadCloser, Attrs, error)
	// list returns the names of objects that begin with prefix; glob, if not
	// empty, has to match the whole name, and * matches no slash in it.
	list(ctx context.Context, prefix, glob string) ([]string, error)
	url(name string) string
	close() error
}

// Bucket is an open bucket. It is safe for concurrent use.
type Bucket struct{ backend backend }

// Open returns the bucket at a gs://, https://, http:// or file:// URL. A path
// behind the bucket's name is put before every object's name.
func Open(ctx context.Context, rawURL string) (*Bucket, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("open bucket: %w", err), "name a bucket as gs://NAME, https://HOST/PATH or file:///FOLDER")
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fault.New(fault.Usage, fmt.Sprintf("open bucket %s: user, query and fragment have no place in a bucket's URL", u.Redacted()), "leave them out")
	}
	var b backend
	switch u.Scheme {
	case "gs":
		b, err = openGCS(ctx, u)
	case "http", "https":
		b, err = openHTTP(u, retryWait)
	case "file":
		b, err = openFolder(u)
	default:
		return nil, fault.New(fault.Usage, fmt.Sprintf("open bucket %q: unknown kind of URL", rawURL), "name a bucket as gs://NAME, https://HOST/PATH or file:///FOLDER")
	}
	if err != nil {
		return nil, fmt.Errorf("open bucket %s: %w", rawURL, err)
	}
	return &Bucket{b}, nil
}

// Close lets go of connections and folders.
func (b *Bucket) Close() error { return b.backend.close() }

// URL returns the object's URL, for people and for provenance.
func (b *Bucket) URL(name string) string { return b.backend.url(name) }

// Get opens an object. The error is a fault.InputMissing when there is none;
// transient trouble is retried a few times first. The stream is not verified;
// it breaks, as transient trouble, when nothing comes for minutes.
func (b *Bucket) Get(ctx context.Context, name string) (io.ReadCloser, Attrs, error) {
	if err := checkName(name); err != nil {
		return nil, Attrs{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	r, attrs, err := b.backend.get(ctx, name)
	if err != nil {
		cancel()
		return nil, Attrs{}, fmt.Errorf("fetch %s: %w", b.URL(name), err)
	}
	return watch(r, b.URL(name), cancel), attrs, nil
}

// ReadSmall returns the content of an object of at most limit bytes.
func (b *Bucket) ReadSmall(ctx context.Context, name string, limit int64) ([]byte, error) {
	r, _, err := b.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, fmt.Errorf("fetch %s: %w", b.URL(name), err)
	}
	if int64(len(text)) > limit {
		return nil, fault.New(fault.Unsupported, fmt.Sprintf("fetch %s: more than %d bytes", b.URL(name), limit), "check that the bucket holds COS builds")
	}
	return text, nil
}

// List returns the names of all objects that begin with prefix, in order. The
// error is a fault.Unsupported for web servers, which cannot list.
func (b *Bucket) List(ctx context.Context, prefix string) ([]string, error) {
	return b.list(ctx, prefix, "")
}

func (b *Bucket) list(ctx context.Context, prefix, glob string) ([]string, error) {
	if prefix != "" {
		if err := checkName(strings.TrimSuffix(prefix, "/")); err != nil {
			return nil, err
		}
	}
	names, err := b.backend.list(ctx, prefix, glob)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", b.URL(prefix), err)
	}
	slices.Sort(names)
	return names, nil
}

// Builds returns the COS builds in the bucket: those with a kernel_commit. The
// commit itself is not read, since there may be thousands; see [Bucket.Describe].
func (b *Bucket) Builds(ctx context.Context) ([]target.Kernel, error) {
	names, err := b.list(ctx, "", "*/*/kernel_commit")
	if err != nil {
		return nil, err
	}
	var all []target.Kernel
	for _, name := range names {
		parts := strings.Split(name, "/")
		if len(parts) != 3 {
			continue
		}
		if k, err := target.ParseKernel(parts[0], parts[1]); err == nil {
			all = append(all, k)
		}
	}
	return all, nil
}

// Describe returns the kernel with its source commit.
func (b *Bucket) Describe(ctx context.Context, k target.Kernel) (target.Kernel, error) {
	text, err := b.ReadSmall(ctx, CommitName(k), 1<<10)
	if err != nil {
		return k, err
	}
	commit := strings.TrimSpace(string(text))
	if !target.ValidCommit(commit) {
		return k, fault.New(fault.Unsupported, fmt.Sprintf("read %s: %.60q is not a commit of 40 hex digits", b.URL(CommitName(k)), commit), "")
	}
	k.Commit = commit
	return k, nil
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
