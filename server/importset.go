package main

import (
	"context"
	"encoding/json"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/trust"
)

// importSet is what an import sends to a server: the drivers of a bundle and their attachments. It is complete before
// anything is sent. Three kinds of attachments are sent:
//
//   - signed statements about the driver;
//   - byproducts whose digests are in the driver's signed provenance, such as the build's log;
//   - deltas that a node can use. They need no signature, because nodes compare the result with the diff id in the
//     signed config (docs/decisions/0025).
type importSet struct {
	r        *reader
	drivers  map[v1.Hash]bool
	attached map[v1.Hash]bool
	compared map[sized]bool // blobs whose content is known to match their digest
	leftOut  int            // number of attached manifests that are not sent
}

type sized struct {
	digest v1.Hash
	size   int64
}

// maxDeltas is the maximum number of deltas of one driver that are sent. Builders attach at most three, and nodes try
// at most three.
const maxDeltas = 16

func newImportSet(r *reader) *importSet {
	return &importSet{r, map[v1.Hash]bool{}, map[v1.Hash]bool{}, map[sized]bool{}, 0}
}

// addDriver adds a driver and its attachments to the set, and verifies every byte of them. The caller has verified the
// driver's statements.
func (v *importSet) addDriver(ctx context.Context, digest string) error {
	img, err := v.r.repo.Image(ctx, digest)
	if err != nil {
		return err
	}
	m, err := img.Manifest()
	if err != nil {
		return err
	}
	for _, l := range m.Layers {
		if err := v.compare(ctx, l); err != nil {
			return err
		}
	}
	list, err := v.r.repo.Referrers(ctx, digest, "")
	if err != nil {
		return err
	}
	// Statements come first, because they say which other attachments can be trusted.
	byproducts := map[string]bool{}
	rest := map[v1.Hash]*v1.Manifest{}
	for _, d := range list {
		a, err := v.attachment(ctx, digest, d)
		if err != nil {
			return err
		}
		ok := a != nil && registry.ArtifactType(a) == trust.ArtifactTypeBundle
		if ok {
			if ok, err = v.isTrustedStatement(ctx, digest, a.Layers[0], byproducts); err != nil {
				return err
			}
		}
		switch {
		case ok:
			v.attached[d.Digest] = true
		case a != nil:
			rest[d.Digest] = a
		}
	}
	deltas := 0
	for _, d := range list {
		a := rest[d.Digest]
		switch {
		case a == nil:
			continue
		case byproducts[a.Layers[0].Digest.Hex]:
		case deltas < maxDeltas && isDelta(a, m):
			deltas++
		default:
			continue
		}
		if err := v.compare(ctx, a.Layers[0]); err != nil {
			return err
		}
		v.attached[d.Digest] = true
	}
	for _, d := range list {
		if !v.attached[d.Digest] {
			v.leftOut++
			continue
		}
		if _, err := v.r.repo.Image(ctx, d.Digest.String()); err != nil { // reads and checks the config, too
			return err
		}
	}
	hash, err := v1.NewHash(digest)
	v.drivers[hash] = err == nil
	return err
}

// compare verifies that a blob's content matches its digest. It reads each blob only once.
func (v *importSet) compare(ctx context.Context, d v1.Descriptor) error {
	blob := sized{d.Digest, d.Size}
	if v.compared[blob] {
		return nil
	}
	if err := registry.Compare(ctx, v.r.repo, d); err != nil {
		return err
	}
	v.compared[blob] = true
	return nil
}

// attachment returns the manifest of an attachment, or nil if the bundle lacks the manifest. It also returns nil if the
// manifest does not have exactly one layer, or is not attached to the driver.
func (v *importSet) attachment(ctx context.Context, subject string, d v1.Descriptor) (*v1.Manifest, error) {
	raw, err := v.r.repo.Manifest(ctx, d.Digest.String())
	if fault.Is(err, fault.NoArtifact) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var m v1.Manifest
	if json.Unmarshal(raw, &m) != nil || len(m.Layers) != 1 ||
		m.Subject == nil || m.Subject.Digest.String() != subject {
		return nil, nil
	}
	return &m, nil
}

// isTrustedStatement reports whether a payload is a statement about this driver with a trusted signature. From a
// provenance, it adds the SHA-256 of each byproduct to the map.
func (v *importSet) isTrustedStatement(
	ctx context.Context,
	subject string,
	payload v1.Descriptor,
	byproducts map[string]bool,
) (bool, error) {
	if payload.Size > registry.MaxAttachment {
		return false, nil
	}
	raw, err := v.r.repo.Small(ctx, payload)
	if fault.Is(err, fault.NoArtifact) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	st, err := v.r.verifier.Statement(raw)
	if err != nil || !st.About(subject) {
		return false, nil
	}
	if st.PredicateType == trust.PredicateProvenance { // https://slsa.dev/spec/v1.0/provenance#byproducts
		var p struct {
			RunDetails struct {
				Byproducts []struct {
					Digest map[string]string `json:"digest"`
				} `json:"byproducts"`
			} `json:"runDetails"`
		}
		if err := json.Unmarshal(st.Predicate, &p); err != nil {
			return false, nil
		}
		for _, b := range p.RunDetails.Byproducts {
			byproducts[b.Digest["sha256"]] = true
		}
	}
	return true, nil
}

// isDelta reports whether nodes would use an attachment as a delta. A delta names its base layer, and is at most half
// as large as the driver's layer of modules.
func isDelta(a, driver *v1.Manifest) bool {
	if registry.ArtifactType(a) != bundle.ArtifactTypeDelta {
		return false
	}
	if _, err := v1.NewHash(a.Annotations[bundle.AnnotationDeltaFrom]); err != nil {
		return false
	}
	for _, l := range driver.Layers {
		if l.Annotations[bundle.AnnotationLayer] == string(bundle.LayerModules) {
			return a.Layers[0].Size <= l.Size/2
		}
	}
	return false
}

// isDriver and isAttached are callbacks of [registry.CopyTagged]. They report whether to copy a manifest.
func (v *importSet) isDriver(d v1.Descriptor, _ *v1.Manifest) bool { return v.drivers[d.Digest] }
func (v *importSet) isAttached(d v1.Descriptor) bool               { return v.attached[d.Digest] }
