package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"sort"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/prebake/prebake/pkg/fault"
)

// Copied says how much [Copy] copied.
type Copied struct {
	// Referrers is the number of attached manifests that were copied.
	Referrers int
}

// Copy copies an image and its attached manifests from one repository to another. The callback want selects the
// attached manifests; nil selects all. Copy copies byte for byte, so the digests stay the same. It skips what the
// target has already, and copies no tags.
//
// Copy, [CopyTagged] and [Compare] are functions and not methods, so that a program that does not call them does not
// link them.
func Copy(
	ctx context.Context,
	from, to *Repository,
	digest string,
	want func(v1.Descriptor) bool,
) (Copied, error) {
	var c Copied
	err := func() error {
		img, err := from.Image(ctx, digest)
		if err != nil {
			return err
		}
		if _, err := to.Push(ctx, img); err != nil {
			return err
		}
		attached, err := from.Referrers(ctx, digest, "")
		if err != nil {
			return err
		}
		for _, d := range attached {
			if want != nil && !want(d) {
				continue
			}
			if err := copyAttached(ctx, from, to, digest, d.Digest.String()); err != nil {
				return err
			}
			c.Referrers++
		}
		return nil
	}()
	if err != nil {
		return c, fmt.Errorf("copy %s from %s to %s: %w", digest, from.name, to.name, err)
	}
	return c, nil
}

func copyAttached(ctx context.Context, from, to *Repository, subject, digest string) error {
	img, err := from.Image(ctx, digest)
	if err != nil {
		return err
	}
	m, err := img.Manifest()
	if err != nil {
		return err
	}
	if m.Subject == nil || m.Subject.Digest.String() != subject {
		return fault.Errorf(fault.Unverified, "%s is listed as attached to %s, but its manifest has another subject, or none",
			digest, subject)
	}
	a := &attachment{whole: img, subject: m.Subject.Digest}
	if a.desc, err = describe(img); err != nil {
		return err
	}
	a.desc.ArtifactType, a.desc.Annotations = ArtifactType(m), EntryAnnotations(m.Annotations)
	return to.s.attach(ctx, a)
}

// ArtifactType returns the value for the artifactType field in a referrers list: the manifest's artifactType or, if
// that is empty, the config's media type (image-spec 1.1, "guidelines for artifact usage").
func ArtifactType(m *v1.Manifest) string {
	if m.ArtifactType != "" {
		return m.ArtifactType
	}
	return string(m.Config.MediaType)
}

// Image returns the image with this digest. It compares the manifest and the config with their digests, but not the
// layers, which are read later.
func (r *Repository) Image(ctx context.Context, digest string) (v1.Image, error) {
	raw, err := r.Manifest(ctx, digest)
	if err != nil {
		return nil, err
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil || m.MediaType != "" && !m.MediaType.IsImage() {
		return nil, fault.Errorf(
			fault.Unverified,
			"read manifest %s from %s: this is not the manifest of an image, but has media type %.100q",
			digest,
			r.name,
			m.MediaType,
		)
	}
	for _, d := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		if err := checkDigest(d.Digest.String()); err != nil || d.Size < 0 {
			return nil, fault.Errorf(
				fault.Unverified,
				"read manifest %s from %s: the manifest names a blob with the wrong digest %.100q or size %d",
				digest,
				r.name,
				d.Digest,
				d.Size,
			)
		}
	}
	config, err := r.Small(ctx, m.Config)
	if err != nil {
		return nil, err
	}
	return partial.CompressedToImage(remoteImage{ctx, r, raw, config, m})
}

// remoteImage has the methods from which package partial makes a v1.Image. It contains a context, so it is used within
// one call only.
type remoteImage struct {
	ctx         context.Context
	r           *Repository
	raw, config []byte
	manifest    v1.Manifest
}

func (i remoteImage) RawConfigFile() ([]byte, error) { return i.config, nil }
func (i remoteImage) RawManifest() ([]byte, error)   { return i.raw, nil }

func (i remoteImage) MediaType() (types.MediaType, error) {
	if i.manifest.MediaType == "" { // the field is optional
		return types.OCIManifestSchema1, nil
	}
	return i.manifest.MediaType, nil
}

func (i remoteImage) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	for _, d := range append([]v1.Descriptor{i.manifest.Config}, i.manifest.Layers...) {
		if d.Digest == h {
			return remoteLayer{i, d}, nil
		}
	}
	return nil, fmt.Errorf("the image has no layer %s", h)
}

type remoteLayer struct {
	i remoteImage
	d v1.Descriptor
}

func (l remoteLayer) Digest() (v1.Hash, error)            { return l.d.Digest, nil }
func (l remoteLayer) Size() (int64, error)                { return l.d.Size, nil }
func (l remoteLayer) MediaType() (types.MediaType, error) { return l.d.MediaType, nil }
func (l remoteLayer) DiffID() (v1.Hash, error)            { return l.d.Digest, nil } // not called for a stored image
func (l remoteLayer) Compressed() (io.ReadCloser, error) {
	return l.i.r.Blob(l.i.ctx, l.d.Digest.String(), l.d.Size)
}

// AnnotationRefName is the annotation with the tag of an entry in a layout's index.
const AnnotationRefName = refName

// ReferrersListType is the media type of the list that [ReferrersList] returns.
const ReferrersListType = types.OCIImageIndex

// listTag returns the tag under which a subject's referrers are listed.
func listTag(subject string) string { return strings.Replace(subject, ":", "-", 1) }

// ReferrersTag returns the tag of a manifest's list of referrers in a repository without the referrers API
// (distribution-spec 1.1, "Referrers Tag Schema").
func ReferrersTag(digest string) string { return listTag(digest) }

// ReferrersList returns the content for [ReferrersTag]: an index of these manifests, sorted by their digests.
func ReferrersList(referrers []v1.Descriptor) ([]byte, error) {
	list := slices.Clone(referrers)
	// Not slices.SortFunc, which adds 20 KB to each program.
	sort.Slice(list, func(i, j int) bool { return list[i].Digest.Hex < list[j].Digest.Hex })
	return json.Marshal(v1.IndexManifest{SchemaVersion: 2, MediaType: ReferrersListType, Manifests: list})
}

// EntryAnnotations returns the annotations that an attached manifest may have in an index. It removes
// [AnnotationRefName], because with this annotation anybody who may attach could set a tag.
func EntryAnnotations(of map[string]string) map[string]string {
	kept := maps.Clone(of)
	delete(kept, refName)
	return kept
}

// Tagged is one tag that [CopyTagged] copied.
type Tagged struct {
	Tag    string `json:"tag"`
	Digest string `json:"digest"`
	// Attached is the number of manifests that were attached to the image and copied.
	Attached int `json:"attached"`
}

// EachTagged passes each tagged image to the callback, sorted by tag. It skips names that are not valid tags. It
// returns the first error of a request or of the callback.
func EachTagged(
	ctx context.Context,
	r *Repository,
	visit func(tag string, d v1.Descriptor, m *v1.Manifest) error,
) error {
	tags, err := r.Tags(ctx)
	if err != nil {
		return err
	}
	slices.Sort(tags)
	read := map[v1.Hash]*v1.Manifest{}
	for _, tag := range tags {
		if !tagPattern.MatchString(tag) {
			continue // in a layout an image may have a name that is not a valid tag
		}
		d, err := r.Resolve(ctx, tag)
		if err != nil {
			return err
		}
		if !d.MediaType.IsImage() {
			continue
		}
		m, ok := read[d.Digest]
		if !ok {
			raw, err := r.Manifest(ctx, d.Digest.String())
			if err != nil {
				return err
			}
			m = &v1.Manifest{}
			if json.Unmarshal(raw, m) != nil {
				m = nil
			}
			read[d.Digest] = m
		}
		if m == nil {
			continue
		}
		if err := visit(tag, d, m); err != nil {
			return err
		}
	}
	return nil
}

// CopyTagged copies each selected image that has a tag, with all its tags. The callback want selects the images. The
// callback attached selects their attached manifests; nil selects all. The result is sorted by tag. If another manifest
// has the tag in the target, the error is of kind PublishRefused.
func CopyTagged(
	ctx context.Context,
	from, to *Repository,
	want func(d v1.Descriptor, m *v1.Manifest) bool,
	attached func(v1.Descriptor) bool,
) (all []Tagged, err error) {
	copied := map[v1.Hash]Copied{}
	err = EachTagged(ctx, from, func(tag string, d v1.Descriptor, m *v1.Manifest) (err error) {
		if !want(d, m) {
			return nil
		}
		digest := d.Digest.String()
		if _, ok := copied[d.Digest]; !ok {
			if copied[d.Digest], err = Copy(ctx, from, to, digest, attached); err != nil {
				return err
			}
		}
		if err := to.Tag(ctx, d, tag); err != nil {
			return err
		}
		all = append(all, Tagged{tag, digest, copied[d.Digest].Referrers})
		return nil
	})
	return all, err
}
