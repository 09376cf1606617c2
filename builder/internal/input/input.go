// Package input fetches objects of a bucket into the cache. It compares each object with its checksum file and
// describes it for the provenance. If the cache has content with the published checksum, the package does not fetch it
// again.
//
// The package never keeps bytes that differ from their checksum. It reads only small objects, such as toolchain_env,
// into memory, and streams all others.
package input

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"path"
	"regexp"
	"strings"
	"sync"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
)

// Source has the methods of a bucket that this package uses.
type Source interface {
	Get(ctx context.Context, name string) (io.ReadCloser, cosbucket.Attrs, error)
	URL(name string) string
}

// Material is one input of a build, as the provenance lists it.
type Material struct {
	Name   string `json:"name"`
	URI    string `json:"uri"`
	Digest string `json:"digest"` // sha256:…
	Size   int64  `json:"size"`
	// Unverified is true if the bucket has no checksum for this object. The digest says which bytes were used, but nothing
	// proves that they are right.
	Unverified bool `json:"unverified,omitempty"`
}

// Algorithm is the hash algorithm of a checksum.
type Algorithm string

// These constants are the algorithms of the checksums that buckets publish.
const (
	MD5    Algorithm = "md5"
	SHA256 Algorithm = "sha256"
)

func (a Algorithm) new() hash.Hash {
	if a == MD5 {
		return md5.New()
	}
	return sha256.New()
}

// Sum is a published checksum. The zero value means that no checksum is published.
type Sum struct {
	Algorithm Algorithm
	Hex       string
	// Of is the URL of the object that the checksum describes, at the mirror that published the checksum. "" means
	// unknown.
	Of string
}

// maxSum is the maximum size of a checksum file in bytes. It has one digest and a file name.
const maxSum = 4 << 10

// maxObject is the maximum size of an object in bytes. COS's toolchain and vmlinux with symbols have 0.7 GB each.
const maxObject = 32 << 30

// fetchedKind is the kind of cached facts that map the checksum of an object to a blob.
const fetchedKind = "fetched-v1"

// attempts is how often [Fetcher.Blob] downloads an object whose stream breaks. The bucket client retries requests that
// fail before the first byte.
const attempts = 3

// reportEvery is the number of bytes between two progress lines.
const reportEvery = 64 << 20

// Fetcher fetches from one bucket into one cache.
type Fetcher struct {
	Source Source
	Cache  *cas.Cache
	// Progress receives one line at a time, never concurrently. It may be nil.
	Progress func(string)

	mu sync.Mutex
}

// Progressf reports one line of progress.
func (f *Fetcher) Progressf(format string, args ...any) {
	if f.Progress == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.Progress(fmt.Sprintf(format, args...))
}

var sumPattern = map[Algorithm]*regexp.Regexp{
	MD5:    regexp.MustCompile(`^[0-9a-f]{32}$`),
	SHA256: regexp.MustCompile(`^[0-9a-f]{64}$`),
}

// ParseSum reads an object's checksum from the content of a checksum file: only a hex digest, or `hex name` lines of
// md5sum. It uses the first line with only a digest, or with the object's name.
func ParseSum(a Algorithm, text []byte, object string) (Sum, error) {
	base := path.Base(object)
	for line := range bytes.Lines(text) {
		fields := strings.Fields(string(line))
		if len(fields) == 0 {
			continue
		}
		sum := strings.ToLower(fields[0])
		named := len(fields) == 2 && path.Base(strings.TrimPrefix(fields[1], "*")) == base
		if sumPattern[a].MatchString(sum) && (len(fields) == 1 || named) {
			return Sum{Algorithm: a, Hex: sum}, nil
		}
	}
	return Sum{}, fault.New(fault.Checksum,
		fmt.Sprintf("read %s checksum of %s: no line of the checksum file has a %s checksum of this object", a, base, a),
		"write the digest in hex, or the line that "+string(a)+"sum prints, into the checksum file")
}

// Sum reads the checksum file of an object. If the file does not exist, the error is InputMissing.
func (f *Fetcher) Sum(ctx context.Context, a Algorithm, sumName, object string) (Sum, error) {
	text, attrs, err := f.read(ctx, sumName, maxSum)
	if err != nil {
		return Sum{}, err
	}
	sum, err := ParseSum(a, text, object)
	if bucket, ok := strings.CutSuffix(attrs.URL, sumName); ok && err == nil {
		sum.Of = bucket + object
	}
	return sum, err
}

// ChecksumFile reads an object's .md5, or else its .sha256. If the object has neither, the returned sum is zero.
func (f *Fetcher) ChecksumFile(ctx context.Context, object string) (Sum, error) {
	sum, err := f.Sum(ctx, MD5, cosbucket.MD5Name(object), object)
	if fault.Is(err, fault.InputMissing) {
		sum, err = f.Sum(ctx, SHA256, cosbucket.SHA256Name(object), object)
	}
	if fault.Is(err, fault.InputMissing) {
		return Sum{}, nil
	}
	return sum, err
}

// read reads an object of at most limit bytes.
func (f *Fetcher) read(ctx context.Context, name string, limit int64) ([]byte, cosbucket.Attrs, error) {
	body, attrs, err := f.Source.Get(ctx, name)
	if err != nil {
		return nil, attrs, err
	}
	if attrs.URL == "" {
		attrs.URL = f.Source.URL(name)
	}
	data, err := io.ReadAll(io.LimitReader(body, limit+1))
	if err = errors.Join(err, body.Close()); err != nil {
		return nil, attrs, fmt.Errorf("fetch %s: %w", attrs.URL, err)
	}
	if int64(len(data)) > limit {
		return nil, attrs, fault.New(fault.Unsupported,
			fmt.Sprintf("fetch %s: the object has more than %d bytes", attrs.URL, limit),
			"put the original object into the bucket again: it is much smaller")
	}
	return data, attrs, nil
}

// fact is the stored information about an object that was fetched.
type fact struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

// key returns the key of the stored fact about an object with this checksum. It has the bucket's URL but not the
// object's name, because the COS builds of one milestone have the same toolchain under different names. An MD5
// collision adds no risk: an attacker who can put an object with the same MD5 into the bucket can also replace the
// object itself.
func (f *Fetcher) key(name string, s Sum) string {
	return strings.TrimSuffix(f.Source.URL(name), name) + "\n" + string(s.Algorithm) + ":" + s.Hex
}

// cachedFact returns the fact about an object with this checksum, if the cache has its content.
func (f *Fetcher) cachedFact(name string, s Sum) (fact, bool) {
	var known fact
	raw, ok := f.Cache.Fact(fetchedKind, f.key(name, s))
	if !ok || s.Hex == "" || json.Unmarshal(raw, &known) != nil {
		return fact{}, false
	}
	_, ok = f.Cache.Blob(known.Digest)
	return known, ok
}

// Blob fetches an object into the cache and returns its material and its path. It compares the content with the given
// sum, or else with the MD5 in the bucket's metadata. The bucket client checks a CRC32C in the metadata. Without any
// checksum, the material is marked as unverified.
func (f *Fetcher) Blob(ctx context.Context, name string, sum Sum) (Material, string, error) {
	known, ok := f.cachedFact(name, sum)
	at, vouched := sum.Of, sum.Hex != ""
	if ok {
		f.Progressf("%s: unchanged, from the cache", path.Base(name))
	} else {
		var attrs cosbucket.Attrs
		var err error
		for try := 1; ; try++ {
			known, attrs, err = f.fetch(ctx, name, sum)
			if err == nil {
				break
			}
			if try == attempts || !fault.Is(err, fault.Transient) {
				return Material{}, "", err
			}
			f.Progressf("%s: %v: trying again", path.Base(name), err)
		}
		at, vouched = attrs.URL, vouched || attrs.MD5 != "" || attrs.CRC32C != ""
	}
	if at == "" {
		at = f.Source.URL(name)
	}
	m := Material{Name: path.Base(name), URI: at, Digest: known.Digest, Size: known.Size, Unverified: !vouched}
	file, ok := f.Cache.Blob(known.Digest)
	if !ok {
		return Material{}, "", fmt.Errorf("fetch %s: blob %s vanished from the cache", name, known.Digest)
	}
	return m, file, nil
}

// Recheck reads a blob of [Fetcher.Blob] again and compares it with its digest. If the blob is damaged, Recheck fetches
// it again to the same path. Call Recheck before making something permanent from a blob, because the blob may have been
// in the cache for a year.
func (f *Fetcher) Recheck(ctx context.Context, name string, sum Sum, m Material) error {
	err := f.Cache.Verify(ctx, m.Digest)
	if !fault.Is(err, fault.Checksum) {
		return err
	}
	f.Progressf("%s: damaged in the cache, fetching it again: %v", m.Name, err)
	again, _, err := f.Blob(ctx, name, sum)
	if err == nil && again.Digest != m.Digest {
		err = fault.New(fault.Checksum,
			fmt.Sprintf("fetch %s again: the object has digest %s now, and had %s before", m.URI, again.Digest, m.Digest),
			"run the command again")
	}
	return err
}

// fetch downloads the object once and compares it with the given sum, or else with the MD5 in the bucket's metadata.
func (f *Fetcher) fetch(ctx context.Context, name string, sum Sum) (fact, cosbucket.Attrs, error) {
	body, attrs, err := f.Source.Get(ctx, name)
	if err != nil {
		return fact{}, attrs, err
	}
	defer body.Close()
	switch told := sumPattern[MD5].MatchString(attrs.MD5); {
	case told && sum.Hex == "":
		sum = Sum{Algorithm: MD5, Hex: attrs.MD5}
		if known, ok := f.cachedFact(name, sum); ok {
			f.Progressf("%s: unchanged, from the cache", path.Base(name))
			return known, attrs, nil
		}
	case told && sum.Algorithm == MD5 && sum.Hex != attrs.MD5:
		// This check comes before the download, so that nobody waits for gigabytes to see the error.
		return fact{}, attrs, fmt.Errorf("fetch %s: %w", f.Source.URL(name),
			mismatch(name, sum, fmt.Errorf("the bucket's metadata has MD5 %s", attrs.MD5)))
	}
	want := ""
	if sum.Algorithm == SHA256 {
		want = "sha256:" + sum.Hex
	}
	s := &stream{r: body, progress: f.Progressf, name: path.Base(name), size: attrs.Size, sum: sum}
	if sum.Hex != "" && want == "" {
		s.hash = sum.Algorithm.new()
	}
	digest, size, err := f.Cache.PutBlob(ctx, s, want)
	if err != nil {
		if want != "" && fault.Is(err, fault.Checksum) {
			err = mismatch(name, sum, err)
		}
		return fact{}, attrs, fmt.Errorf("fetch %s: %w", f.Source.URL(name), err)
	}
	known := fact{digest, size}
	f.Progressf("%s: fetched, %.1f MB", path.Base(name), float64(size)/1e6)
	if sum.Hex == "" {
		return known, attrs, nil
	}
	raw, err := json.Marshal(known)
	if err != nil {
		return fact{}, attrs, err
	}
	return known, attrs, f.Cache.PutFact(fetchedKind, f.key(name, sum), raw)
}

func mismatch(name string, sum Sum, cause error) error {
	return fault.Wrap(fault.Checksum,
		fmt.Errorf("%s does not have its published %s checksum %s: %w", path.Base(name), sum.Algorithm, sum.Hex, cause),
		"replace the object or its checksum in the bucket: one of the two is damaged")
}

// Small reads an object of at most limit bytes into memory and checks it against its checksum file.
func (f *Fetcher) Small(ctx context.Context, name string, limit int64) ([]byte, Material, error) {
	data, attrs, err := f.read(ctx, name, limit)
	if err != nil {
		return nil, Material{}, err
	}
	sum, err := f.ChecksumFile(ctx, name)
	if err != nil {
		return nil, Material{}, err
	}
	if sum.Hex != "" {
		h := sum.Algorithm.new()
		h.Write(data)
		if got := hex.EncodeToString(h.Sum(nil)); got != sum.Hex {
			return nil, Material{}, fmt.Errorf("fetch %s: %w", attrs.URL, mismatch(name, sum,
				fmt.Errorf("the content has checksum %s", got)))
		}
	}
	digest := sha256.Sum256(data)
	m := Material{
		Name: path.Base(name), URI: attrs.URL, Digest: "sha256:" + hex.EncodeToString(digest[:]), Size: int64(len(data)),
		Unverified: sum.Hex == "" && attrs.MD5 == "" && attrs.CRC32C == "",
	}
	return data, m, nil
}

// stream hashes a download and reports progress. If size or checksum is wrong, Read returns an error and never io.EOF,
// so the cache stores nothing.
type stream struct {
	r        io.Reader
	progress func(string, ...any)
	name     string
	size     int64 // size that the bucket reported; 0 or less means unknown
	sum      Sum
	hash     hash.Hash // nil if PutBlob checks the sum, or if there is no sum
	n        int64     // bytes read so far
}

func (s *stream) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	if s.hash != nil {
		s.hash.Write(b[:n])
	}
	if before := s.n / reportEvery; (s.n+int64(n))/reportEvery > before && s.size > reportEvery {
		s.progress("%s: %d of %d MB", s.name, (s.n+int64(n))/1e6, s.size/1e6)
	}
	s.n += int64(n)
	switch {
	case s.n > maxObject:
		return n, fault.New(fault.Unsupported, fmt.Sprintf("%s has more than %d GiB", s.name, maxObject>>30),
			"replace the object in the bucket by the right file: no file of COS or NVIDIA is so large")
	case s.size > 0 && s.n > s.size:
		return n, fault.New(fault.Checksum, fmt.Sprintf("%s is longer than the %d bytes that the bucket reports", s.name,
			s.size),
			"run the command again; if the error stays, put the object into the bucket again, or name another mirror")
	case err == nil:
		return n, nil
	case !errors.Is(err, io.EOF):
		return n, streamError(s.name, err)
	case s.size > 0 && s.n < s.size:
		return n, streamError(s.name, fmt.Errorf("the stream ended after %d of %d bytes: %w", s.n, s.size,
			io.ErrUnexpectedEOF))
	}
	if s.hash != nil {
		if got := hex.EncodeToString(s.hash.Sum(nil)); got != s.sum.Hex {
			return n, mismatch(s.name, s.sum, fmt.Errorf("the content has checksum %s", got))
		}
	}
	return n, io.EOF
}

// streamError adds the kind fault.Transient to the error of a stream that ended early. An error that has a kind, or
// that is about a local file or the end of ctx, stays unchanged.
func streamError(name string, err error) error {
	var f *fault.Error
	if errors.As(err, &f) || errors.As(err, new(*fs.PathError)) || errors.Is(err, context.Canceled) ||
		errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fault.Wrap(fault.Transient, fmt.Errorf("read %s: %w", name, err),
		"check the network to the bucket, then run the command again")
}
