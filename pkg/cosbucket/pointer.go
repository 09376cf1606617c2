package cosbucket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// MaxPointer is the maximum size in bytes of an object with a pointer.
const MaxPointer = 4 << 10

// Pointer is the location of an object in another bucket; see [Bucket.Sibling].
type Pointer struct{ Bucket, Path string }

// String returns the object's gs:// URL.
func (p Pointer) String() string { return "gs://" + p.Bucket + "/" + p.Path }

var (
	// bucketPattern is Google's rule for bucket names, but without dots: a domain must not match.
	bucketPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{1,61}[a-z0-9]$`)
	pathPattern   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+=@~/-]{0,999}$`)
)

func (p Pointer) check() error {
	if !bucketPattern.MatchString(p.Bucket) {
		return badPointer("%.80q is not the name of a bucket", p.Bucket)
	}
	if !pathPattern.MatchString(p.Path) || !fs.ValidPath(p.Path) {
		return badPointer("%.80q is not the path of an object", p.Path)
	}
	return nil
}

func badPointer(format string, args ...any) error {
	return fault.New(fault.Unsupported, "read toolchain pointer: "+fmt.Sprintf(format, args...),
		"check the object in the bucket: COS's toolchain.tar.xz.gcs has two lines, bucket: NAME and path: PATH")
}

// ParsePointer parses toolchain.tar.xz.gcs, which has the lines `bucket: NAME` and `path: PATH`. It ignores lines with
// other keys.
func ParsePointer(text []byte) (Pointer, error) {
	var p Pointer
	if len(text) > MaxPointer {
		return p, badPointer("the file has %d bytes; want at most %d bytes", len(text), MaxPointer)
	}
	for line := range strings.Lines(string(text)) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		to := map[string]*string{"bucket": &p.Bucket, "path": &p.Path}[key]
		switch {
		case key == "":
		case !ok:
			return Pointer{}, badPointer("the line %.80q is not NAME: VALUE", key)
		case to == nil:
		case *to != "" && *to != value:
			return Pointer{}, badPointer("%s is set twice, to different values", key)
		default:
			*to = value
		}
	}
	if err := p.check(); err != nil {
		return Pointer{}, err
	}
	return p, nil
}

// ParseToolchainURL parses toolchain_url of old COS builds: a URL that begins with https://storage.googleapis.com/ or
// gs://.
func ParseToolchainURL(text []byte) (Pointer, error) {
	if len(text) > MaxPointer {
		return Pointer{}, badPointer("the file has %d bytes; want at most %d bytes", len(text), MaxPointer)
	}
	u, err := url.Parse(strings.TrimSpace(string(text)))
	if err != nil || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.RawPath != "" {
		return Pointer{}, badPointer("toolchain_url %.80q is not a plain URL", text)
	}
	var p Pointer
	switch {
	case u.Scheme == "gs":
		p = Pointer{u.Host, strings.TrimPrefix(u.Path, "/")}
	case u.Scheme == "https" && u.Host == google:
		p.Bucket, p.Path, _ = strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
	default:
		return Pointer{}, badPointer("toolchain_url %.80q is not in Google Cloud Storage", text)
	}
	if err := p.check(); err != nil {
		return Pointer{}, err
	}
	return p, nil
}

// ParseToolchainPath parses toolchain_path: the compiler's path in COS's SDK bucket. It also returns the same path in
// Chromium OS's SDK bucket, which has the compiler of older COS builds.
func ParseToolchainPath(text []byte) ([]Pointer, error) {
	if len(text) > MaxPointer {
		return nil, badPointer("the file has %d bytes; want at most %d bytes", len(text), MaxPointer)
	}
	at := strings.TrimSpace(string(text))
	all := []Pointer{{"cos-sdk", at}, {"chromiumos-sdk", at}}
	return all, all[0].check()
}

// Sibling opens the pointer's bucket beside bucket b: in Google Cloud Storage, on the same web server, or in the same
// parent folder. A pointer cannot choose another host or protocol.
func (b *Bucket) Sibling(ctx context.Context, p Pointer) (*Bucket, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	s := &Bucket{wait: b.wait}
	var known []string
	for _, m := range b.mirrors {
		n, err := m.sibling(ctx, p.Bucket)
		if err != nil {
			return nil, fmt.Errorf("open bucket %s: %w", p.Bucket, errors.Join(err, s.Close()))
		}
		// Several mirrors may have the same sibling. Mirrors in Google Cloud Storage always do.
		if at := n.url(""); slices.Contains(known, at) {
			err = n.close()
		} else {
			known = append(known, at)
			s.mirrors = append(s.mirrors, n)
		}
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	return s, nil
}
