// Package registry keeps artifacts in one repository: on a registry that
// speaks the OCI distribution API, or in an OCI image layout in a folder. What
// it hands out by digest is bounded in size, and manifests are compared with
// their digest. It refuses to overwrite a tag, to follow a tag where a digest
// was asked for, and to judge what an artifact is worth.
package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/fault"
)

// MaxManifest bounds a manifest, an index and a list of referrers, all pages of
// it together.
const MaxManifest = 4 << 20

// Options say how to speak to a registry; the zero value asks the user's
// Docker configuration for credentials.
type Options struct {
	// Username and Password are sent where the registry asks for them. A
	// password alone is a token. Both empty: the Docker configuration decides.
	Username, Password string
	// Keychain finds credentials where there is no password; nil means the user's
	// Docker configuration.
	Keychain authn.Keychain
	// Plain speaks HTTP. Loopback and private addresses are tried both ways
	// without it.
	Plain bool
	// RetryFor is how long a download that broke is tried again before something of it
	// comes; less than half a minute is half a minute.
	RetryFor time.Duration
	// UserAgent names the program.
	UserAgent string
	// Transport replaces the usual one; nil means the usual one.
	Transport http.RoundTripper
}

// store is one of the two kinds of places.
type store interface {
	resolve(ctx context.Context, ref string) (v1.Descriptor, error)
	manifest(ctx context.Context, digest string) ([]byte, error)
	blob(ctx context.Context, digest string, size int64) (io.ReadCloser, error)
	referrers(ctx context.Context, digest string) ([]v1.Descriptor, error)
	push(ctx context.Context, img v1.Image) error
	tag(ctx context.Context, d v1.Descriptor, tag string) error
	attach(ctx context.Context, a *attachment) error
	checkPush(ctx context.Context) error
	tags(ctx context.Context) ([]string, error)
}

// Repository is one repository. Its methods may be called concurrently.
type Repository struct {
	name string
	s    store
}

// Open names a repository: host[:port]/name on a registry, oci:PATH for a
// layout in a folder, oci-archive:FILE for one in a tar, oci-archive:FILE+FILE
// for one in several of which each but the first is a delta, or oci:URL
// (https://, http:// or gs://) for one on a web server; the last three are only
// read. Nobody is contacted and no file opened; a folder is made when something
// is first written to it.
func Open(ref string, o Options) (*Repository, error) {
	var s store
	var err error
	if dir, ok := strings.CutPrefix(ref, "oci:"); ok && isSite(dir) {
		s, err = openSite(dir, o)
	} else if ok {
		s, err = openLayout(dir)
	} else if files, ok := strings.CutPrefix(ref, archivePrefix); ok {
		s, err = openArchives(files)
	} else {
		s, err = openRemote(ref, o)
	}
	if err != nil {
		return nil, fault.Wrap(
			fault.Usage,
			fmt.Errorf("open repository %q: %w", ref, err),
			"name it HOST[:PORT]/NAME, oci:PATH for a folder, oci-archive:FILE for a tar, or oci:https://HOST/PATH or "+
				"oci:gs://BUCKET/PATH",
		)
	}
	return &Repository{name: ref, s: s}, nil
}

// Name returns the name under which the repository was opened.
func (r *Repository) Name() string { return r.name }

var (
	tagPattern    = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`) // distribution-spec
	digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
)

func checkDigest(digest string) error {
	if !digestPattern.MatchString(digest) {
		return fault.Errorf(fault.Usage, "digest %.100q: want sha256: and 64 lower-case hex digits", digest)
	}
	return nil
}

// Resolve returns what a tag or a digest names. Nothing there is
// [fault.NoArtifact].
func (r *Repository) Resolve(ctx context.Context, tagOrDigest string) (v1.Descriptor, error) {
	if !tagPattern.MatchString(tagOrDigest) && !digestPattern.MatchString(tagOrDigest) {
		return v1.Descriptor{}, fault.Errorf(
			fault.Usage,
			"resolve %.100q in %s: neither a tag nor a digest",
			tagOrDigest,
			r.name,
		)
	}
	d, err := r.s.resolve(ctx, tagOrDigest)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("resolve %s in %s: %w", tagOrDigest, r.name, err)
	}
	return d, nil
}

// Manifest returns the manifest with this digest; its bytes were compared.
func (r *Repository) Manifest(ctx context.Context, digest string) ([]byte, error) {
	err := checkDigest(digest)
	var raw []byte
	if err == nil {
		raw, err = r.s.manifest(ctx, digest)
	}
	if err == nil {
		err = sameDigest(raw, digest)
	}
	if err != nil {
		return nil, fmt.Errorf("read manifest %s from %s: %w", digest, r.name, err)
	}
	return raw, nil
}

// Blob opens a blob. The bytes are not verified: the reader does that, and
// takes care not to use them before. More than size bytes are never delivered.
func (r *Repository) Blob(ctx context.Context, digest string, size int64) (io.ReadCloser, error) {
	err := checkDigest(digest)
	var rc io.ReadCloser
	if err == nil {
		rc, err = r.s.blob(ctx, digest, size)
	}
	if err != nil {
		return nil, fmt.Errorf("read blob %s from %s: %w", digest, r.name, err)
	}
	return rc, nil
}

// Referrers lists what is attached to a manifest, in a stable order: all of
// it, or what has this artifact type.
func (r *Repository) Referrers(ctx context.Context, digest, artifactType string) ([]v1.Descriptor, error) {
	all, err := r.list(ctx, digest)
	if err != nil || artifactType == "" {
		return all, err
	}
	var list []v1.Descriptor
	for _, d := range all {
		if mayBe(d, artifactType) && (d.ArtifactType == artifactType || r.attachedAs(ctx, d, artifactType)) {
			d.ArtifactType = artifactType
			list = append(list, d)
		}
	}
	return list, nil
}

// list returns all manifests that are attached to one, by digest.
func (r *Repository) list(ctx context.Context, digest string) ([]v1.Descriptor, error) {
	err := checkDigest(digest)
	var all []v1.Descriptor
	if err == nil {
		all, err = r.s.referrers(ctx, digest)
	}
	if err != nil {
		return nil, fmt.Errorf("list referrers of %s in %s: %w", digest, r.name, err)
	}
	all = slices.DeleteFunc(
		all,
		func(d v1.Descriptor) bool { return !d.MediaType.IsImage() || checkDigest(d.Digest.String()) != nil },
	)
	slices.SortFunc(all, func(a, b v1.Descriptor) int { return strings.Compare(a.Digest.Hex, b.Digest.Hex) })
	return slices.CompactFunc(all, func(a, b v1.Descriptor) bool { return a.Digest == b.Digest }), nil
}

func (r *Repository) attachedAs(ctx context.Context, d v1.Descriptor, artifactType string) bool {
	raw, err := r.Manifest(ctx, d.Digest.String())
	if err != nil {
		return false
	}
	var m v1.Manifest
	return json.Unmarshal(raw, &m) == nil && m.ArtifactType == artifactType
}

// Small reads a whole blob of at most [MaxManifest] bytes and compares it with
// its descriptor.
func (r *Repository) Small(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	if d.Size < 0 || d.Size > MaxManifest {
		return nil, fault.Errorf(
			fault.Unverified,
			"read blob %s from %s: %d bytes; at most %d are read",
			d.Digest,
			r.name,
			d.Size,
			MaxManifest,
		)
	}
	rc, err := r.Blob(ctx, d.Digest.String(), d.Size)
	if err != nil {
		return nil, err
	}
	raw, err := io.ReadAll(io.LimitReader(rc, d.Size+1))
	if cerr := rc.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = sameDigest(raw, d.Digest.String())
	}
	if err != nil {
		return nil, fmt.Errorf("read blob %s from %s: %w", d.Digest, r.name, err)
	}
	return raw, nil
}

// Push stores an image by its digest, blobs first, and sends no blob that is
// there already. It gets no tag.
func (r *Repository) Push(ctx context.Context, img v1.Image) (v1.Descriptor, error) {
	d, err := describe(img)
	if err == nil {
		err = r.s.push(ctx, img)
	}
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("push to %s: %w", r.name, err)
	}
	return d, nil
}

// Tag gives a manifest a tag. A tag that names the same manifest is left; one
// that names another is [fault.PublishRefused] and stays as it is.
func (r *Repository) Tag(ctx context.Context, d v1.Descriptor, tag string) error {
	if !tagPattern.MatchString(tag) {
		return fault.Errorf(fault.Usage, "tag %.100q in %s: not a valid tag", tag, r.name)
	}
	if err := r.s.tag(ctx, d, tag); err != nil {
		return fmt.Errorf("tag %s in %s: %w", tag, r.name, err)
	}
	return nil
}

// taken is the refusal to move a tag.
func taken(have v1.Hash, want v1.Hash) error {
	return fault.New(fault.PublishRefused, fmt.Sprintf("it names %s already, not %s", have, want),
		"published artifacts are never replaced: remove the tag by hand if it is wrong")
}

// Attach stores payload as a referrer of subject. The same payload attached
// again is the same referrer.
func (r *Repository) Attach(
	ctx context.Context,
	subject v1.Descriptor,
	artifactType string,
	payload []byte,
	annotations map[string]string,
) (v1.Descriptor, error) {
	layer, open, err := inMemory(artifactType, payload)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("attach to %s in %s: %w", subject.Digest, r.name, err)
	}
	return r.AttachLayer(ctx, subject, artifactType, layer, open, annotations)
}

// AttachLayer is [Repository.Attach] for a payload of any size, which open
// reads: layer says what it is.
func (r *Repository) AttachLayer(
	ctx context.Context,
	subject v1.Descriptor,
	artifactType string,
	layer v1.Descriptor,
	open func() (io.ReadCloser, error),
	annotations map[string]string,
) (v1.Descriptor, error) {
	a, err := newAttachment(subject, artifactType, layer, open, annotations)
	if err == nil {
		err = r.s.attach(ctx, a)
	}
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("attach to %s in %s: %w", subject.Digest, r.name, err)
	}
	return a.desc, nil
}

func describe(img v1.Image) (v1.Descriptor, error) {
	raw, err := img.RawManifest()
	if err != nil {
		return v1.Descriptor{}, err
	}
	mt, err := img.MediaType()
	if err != nil {
		return v1.Descriptor{}, err
	}
	digest, size, err := v1.SHA256(bytes.NewReader(raw))
	return v1.Descriptor{MediaType: mt, Digest: digest, Size: size}, err
}

func sameDigest(raw []byte, digest string) error {
	got, _, err := v1.SHA256(bytes.NewReader(raw))
	if err != nil {
		return err
	}
	if got.String() != digest {
		return damaged(fmt.Errorf("digest is %s", got))
	}
	return nil
}

// damaged is the error for bytes that are not what their name says.
func damaged(err error) error {
	return fault.Wrap(
		fault.Unverified,
		err,
		"the repository serves altered bytes: publish the artifact again, or use another repository",
	)
}

// CheckPush reports whether the repository may be written. A registry is asked
// for an upload that is called off at once, which has some make the repository; in
// a layout's folder, or where it is to be made, a file is made and removed.
func (r *Repository) CheckPush(ctx context.Context) error {
	if err := r.s.checkPush(ctx); err != nil {
		return fmt.Errorf("try to write %s: %w", r.name, err)
	}
	return nil
}
