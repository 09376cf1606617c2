// Package registry reads and writes artifacts in one repository. The repository is on a registry with the OCI
// distribution API, or in an OCI image layout.
//
// Everything that the package returns by digest has a bounded size, and each manifest is compared with its digest. The
// package never overwrites a tag. It never follows a tag if the caller asked for a digest. It does not decide whether
// an artifact can be trusted; package trust does.
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
	"sort"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/fault"
)

// MaxManifest is the maximum size in bytes of a manifest or an index. For a list of referrers, see maxList.
const MaxManifest = 4 << 20

// Options configure the access to a registry. With the zero value, credentials come from the user's Docker
// configuration.
type Options struct {
	// Username and Password are sent if the registry requires them. A password without a username is a token.
	Username, Password string
	// Keychain finds credentials if Password is empty. Nil means the user's Docker configuration.
	Keychain authn.Keychain
	// Plain makes the client use HTTP without TLS. If Plain is false, the client tries HTTP only after HTTPS, and only
	// for loopback and private addresses.
	Plain bool
	// RetryFor is how long a broken download is retried while no new data arrives. The minimum is two minutes.
	RetryFor time.Duration
	// UserAgent is the User-Agent header of each request.
	UserAgent string
	// Transport replaces the default HTTP transport. Nil means the default.
	Transport http.RoundTripper
	// Attached is called with the digest of each manifest that was attached to a subject. Own returns those digests. The
	// attachments that Own names are read before all others, so that many attachments of others do not hide them.
	// Attached and Own may be nil.
	Attached func(subject, digest string)
	Own      func(subject string) []string
}

// store is implemented by a registry ([remoteStore]) and by an image layout ([layoutStore]).
type store interface {
	resolve(ctx context.Context, ref string) (v1.Descriptor, error)
	manifest(ctx context.Context, digest string) ([]byte, error)
	blob(ctx context.Context, digest string, size int64) (io.ReadCloser, error)
	// referrers lists the manifests that are attached to a manifest. If it returns an error, it may also return a part
	// of the list, which may have manifests that were not read yet. If unread is true, the caller reads each manifest
	// itself, and referrers need not read any.
	referrers(ctx context.Context, digest string, unread bool) ([]v1.Descriptor, error)
	push(ctx context.Context, img v1.Image) error
	tag(ctx context.Context, d v1.Descriptor, tag string) error
	attach(ctx context.Context, a *attachment) error
	checkPush(ctx context.Context) error
	tags(ctx context.Context) ([]string, error)
	has(ctx context.Context, d v1.Descriptor) (bool, error)
}

// Repository is one repository. Its methods are safe for concurrent use.
type Repository struct {
	name    string
	s       store
	options Options
}

// Open returns the repository with this reference. A reference has one of these forms:
//
//   - HOST[:PORT]/NAME is a repository on a registry.
//   - oci:PATH is an image layout in a folder.
//   - oci-archive:FILE is an image layout in a tar.
//   - oci-archive:FILE+FILE… is a bundle and its deltas: each file but the first is a delta of the file before it.
//   - oci:URL is an image layout on a web server or in a bucket; the URL begins with https://, http:// or gs://.
//
// Repositories of the last three forms are read-only. Open makes no connection and opens no file. The first write to a
// folder creates it.
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
			"write HOST[:PORT]/NAME for a registry, oci:PATH for a folder, oci-archive:FILE for a tar, "+
				"oci:https://HOST/PATH for a web server, or oci:gs://BUCKET/PATH for a bucket",
		)
	}
	return &Repository{name: ref, s: s, options: o}, nil
}

// Name returns the name under which the repository was opened.
func (r *Repository) Name() string { return r.name }

var (
	tagPattern    = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`) // distribution-spec, "Pulling manifests"
	digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
)

func checkDigest(digest string) error {
	if !digestPattern.MatchString(digest) {
		return fault.Errorf(fault.Usage, "digest %.100q: want sha256: and 64 lower-case hex digits", digest)
	}
	return nil
}

// Resolve returns the descriptor of the manifest with this tag or digest. If the repository has no such manifest, the
// error is of kind NoArtifact.
func (r *Repository) Resolve(ctx context.Context, tagOrDigest string) (v1.Descriptor, error) {
	if !tagPattern.MatchString(tagOrDigest) && !digestPattern.MatchString(tagOrDigest) {
		return v1.Descriptor{}, fault.Errorf(
			fault.Usage,
			"resolve %.100q in %s: want a tag or a digest",
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

// Manifest returns the manifest with this digest. It compares the manifest's bytes with the digest.
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

// Blob opens a blob for reading. Blob does not verify the content: the caller must compare the hash of the bytes with
// the digest before it uses them. The reader never returns more than size bytes.
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

// HasBlob reports whether the repository has a blob. It does not compare the digest. For a registry, it compares no
// size either, and does not read the blob's content. For a layout, see [Layout.Has].
func (r *Repository) HasBlob(ctx context.Context, d v1.Descriptor) (bool, error) {
	err := checkDigest(d.Digest.String())
	has := false
	if err == nil {
		has, err = r.s.has(ctx, d)
	}
	if err != nil {
		return false, fmt.Errorf("look for blob %s in %s: %w", d.Digest, r.name, err)
	}
	return has, nil
}

// Referrers lists the manifests that are attached to a manifest, in a stable order. If artifactType is not empty, the
// list has only manifests of that type, and those that [Options.Own] names come first. If a registry lists no types,
// Referrers reads the manifests to find their types, but at most maxManifests of them, and leaves out the others.
func (r *Repository) Referrers(ctx context.Context, digest, artifactType string) ([]v1.Descriptor, error) {
	all, err := r.list(ctx, digest, false)
	if err != nil {
		return nil, err
	}
	if artifactType == "" {
		return all, nil
	}
	var list []v1.Descriptor
	looks := 0
	for _, d := range r.ownFirst(digest, all, len(all)) {
		is := d.ArtifactType == artifactType
		if !is && mayBe(d, artifactType) && looks < maxManifests {
			looks++
			is = r.attachedAs(ctx, d, artifactType)
		}
		if is {
			d.ArtifactType = artifactType
			list = append(list, d)
		}
	}
	return list, nil
}

// ownFirst moves the first attachments that Options.Own names to the front of a list, at most count of them. It keeps
// the order otherwise.
func (r *Repository) ownFirst(subject string, list []v1.Descriptor, count int) []v1.Descriptor {
	if r.options.Own == nil {
		return list
	}
	own := map[string]bool{}
	for _, digest := range r.options.Own(subject) {
		own[digest] = true
	}
	var first, others []v1.Descriptor
	for _, d := range list {
		if own[d.Digest.String()] && len(first) < count {
			first = append(first, d)
		} else {
			others = append(others, d)
		}
	}
	return append(first, others...)
}

// list returns all manifests that are attached to a manifest, sorted by their digests. The error and the parameter
// unread have the same meaning as for the method referrers of [store].
func (r *Repository) list(ctx context.Context, digest string, unread bool) ([]v1.Descriptor, error) {
	err := checkDigest(digest)
	var all []v1.Descriptor
	if err == nil {
		all, err = r.s.referrers(ctx, digest, unread)
	}
	if err != nil {
		err = fmt.Errorf("list referrers of %s in %s: %w", digest, r.name, err)
	}
	all = slices.DeleteFunc(
		all,
		func(d v1.Descriptor) bool { return !d.MediaType.IsImage() || checkDigest(d.Digest.String()) != nil },
	)
	// Not slices.SortFunc, which adds 20 KB to each program.
	sort.Slice(all, func(i, j int) bool { return all[i].Digest.Hex < all[j].Digest.Hex })
	return slices.CompactFunc(all, func(a, b v1.Descriptor) bool { return a.Digest == b.Digest }), err
}

func (r *Repository) attachedAs(ctx context.Context, d v1.Descriptor, artifactType string) bool {
	raw, err := r.Manifest(ctx, d.Digest.String())
	if err != nil {
		return false
	}
	var m v1.Manifest
	return json.Unmarshal(raw, &m) == nil && m.ArtifactType == artifactType
}

// Small reads a whole blob of at most [MaxManifest] bytes, and compares it with the digest of its descriptor.
func (r *Repository) Small(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	if d.Size < 0 || d.Size > MaxManifest {
		return nil, fault.Errorf(
			fault.Unverified,
			"read blob %s from %s: the blob has %d bytes; want at most %d bytes",
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

// SharesList reports whether the attachments of a manifest are in a list that every writer reads and then overwrites:
// the registry lacks the referrers API, so there is a tag with the list.
func (r *Repository) SharesList(ctx context.Context, digest string) (bool, error) {
	s, ok := r.s.(*remoteStore)
	if !ok {
		return false, nil
	}
	if err := checkDigest(digest); err != nil {
		return false, err
	}
	_, err := s.resolve(ctx, strings.Replace(digest, ":", "-", 1))
	if fault.Is(err, fault.Transient) || ctx.Err() != nil {
		return false, fmt.Errorf("find the list of attachments of %s in %s: %w", digest, r.name, err)
	}
	return err == nil, nil
}

// Push stores an image under its digest, without a tag. It sends the blobs first, and skips blobs that the repository
// already has.
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

// Tag adds a tag to a manifest. It never moves a tag: if another manifest has the tag, the error is of kind
// PublishRefused.
func (r *Repository) Tag(ctx context.Context, d v1.Descriptor, tag string) error {
	if !tagPattern.MatchString(tag) {
		return fault.Errorf(fault.Usage, "set tag %.100q in %s: this text is not a valid tag", tag, r.name)
	}
	if err := r.s.tag(ctx, d, tag); err != nil {
		return fmt.Errorf("set tag %s in %s: %w", tag, r.name, err)
	}
	return nil
}

// errTagTaken returns the error for a tag that another manifest has already.
func errTagTaken(have v1.Hash, want v1.Hash) error {
	return fault.New(fault.PublishRefused, fmt.Sprintf("manifest %s has this tag already; want manifest %s", have, want),
		"if the tag is wrong, remove it by hand: builder never replaces a published artifact")
}

// Attach stores a payload as a referrer of subject. A payload that is attached twice has only one referrer.
func (r *Repository) Attach(
	ctx context.Context,
	subject v1.Descriptor,
	artifactType string,
	payload []byte,
	annotations map[string]string,
) (v1.Descriptor, error) {
	layer, open, err := inMemory(artifactType, payload)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("attach a referrer to %s in %s: %w", subject.Digest, r.name, err)
	}
	return r.AttachLayer(ctx, subject, artifactType, layer, open, annotations)
}

// AttachLayer is [Repository.Attach] for a payload of any size. The caller passes the payload's descriptor, and a
// callback that opens the payload.
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
		return v1.Descriptor{}, fmt.Errorf("attach a referrer to %s in %s: %w", subject.Digest, r.name, err)
	}
	if r.options.Attached != nil {
		r.options.Attached(subject.Digest.String(), a.desc.Digest.String())
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
		return damaged(fmt.Errorf("the content has digest %s", got))
	}
	return nil
}

// damaged returns the error for bytes that do not match their digest or their format.
func damaged(err error) error {
	return fault.Wrap(
		fault.Unverified,
		err,
		"publish the artifact again, or use another repository: this one serves altered bytes",
	)
}

// CheckPush returns an error if the caller may not write to the repository. On a registry, it begins an upload and
// cancels it; some registries then create the repository. For a layout, it creates and removes a file in the nearest
// folder that exists.
func (r *Repository) CheckPush(ctx context.Context) error {
	if err := r.s.checkPush(ctx); err != nil {
		return fmt.Errorf("check whether %s can be written: %w", r.name, err)
	}
	return nil
}
