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

// importSet is what of a bundle goes to a server, found before anything is sent: the drivers,
// and of what is attached to them what somebody who is trusted vouches for. These are
// signed statements about the driver, what its signed provenance names by digest, as the
// build's log, and deltas. A delta needs no signature, since its result has to have
// the diff id that the signed config names (docs/decisions/0025); one that is of use to no
// node does not go.
type importSet struct {
	r        *reader
	drivers  map[v1.Hash]bool
	attached map[v1.Hash]bool
	compared map[sized]bool // blobs that are what their digests say
	leftOut  int            // attached manifests
}

type sized struct {
	digest v1.Hash
	size   int64
}

// maxDeltas bounds the deltas of one driver. Builders attach one for each of three former
// kernels, and nodes try three.
const maxDeltas = 16

func newImportSet(r *reader) *importSet {
	return &importSet{r, map[v1.Hash]bool{}, map[v1.Hash]bool{}, map[sized]bool{}, 0}
}

// add reads every byte of a driver, and of what is attached to it that will go along. Its
// statements were verified.
func (v *importSet) add(ctx context.Context, digest string) error {
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
	// Statements come first: they name what else is signed.
	named := map[string]bool{}
	rest := map[v1.Hash]*v1.Manifest{}
	for _, d := range list {
		a, err := v.attachment(ctx, digest, d)
		if err != nil {
			return err
		}
		ok := a != nil && registry.ArtifactType(a) == trust.ArtifactTypeBundle
		if ok {
			if ok, err = v.statement(ctx, digest, a.Layers[0], named); err != nil {
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
		case named[a.Layers[0].Digest.Hex]:
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
		if _, err := v.r.repo.Image(ctx, d.Digest.String()); err != nil { // reads its config, too
			return err
		}
	}
	hash, err := v1.NewHash(digest)
	v.drivers[hash] = err == nil
	return err
}

// compare reads a blob once, however many name it.
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

// attachment reads the manifest of what is attached; nil means one that is listed and not
// there, or of another shape than anything that may go along.
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

// statement reports whether a payload is a statement about this driver that somebody who
// is trusted signed, and adds to named the SHA-256 of what it says the build made besides.
func (v *importSet) statement(
	ctx context.Context,
	subject string,
	payload v1.Descriptor,
	named map[string]bool,
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
			named[b.Digest["sha256"]] = true
		}
	}
	return true, nil
}

// isDelta reports whether an attachment is a delta as nodes take them: of a known layer,
// and at most half as large as the layer of modules.
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

// isDriver and isAttached are what [registry.Repository.CopyTagged] asks.
func (v *importSet) isDriver(d v1.Descriptor, _ *v1.Manifest) bool { return v.drivers[d.Digest] }
func (v *importSet) isAttached(d v1.Descriptor) bool               { return v.attached[d.Digest] }
