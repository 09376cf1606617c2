package tarball

import (
	"context"
	"fmt"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// listing is an object that changes: the index, a format of gpu_driver_versions, or the object of a label.
type listing struct {
	name, contentType string
	limit             int64
	// next returns the new content of the object. have is the present content, or nil.
	next func(have []byte) ([]byte, error)
	// shared is true if next keeps content that others wrote, without verifying it.
	shared bool
}

// updateLists adds the release to gpu_driver_versions, then to the index.
func (p *publisher) updateLists(ctx context.Context, entry Entry) error {
	if forInstaller(p.Driver) {
		serves := func(gpuType string) bool { return p.GPUs.Drives(gpuType, p.Driver.Flavour) }
		if err := p.updateVersions(ctx, withVersion(p.Driver.Version, serves)); err != nil {
			return err
		}
	}
	return p.update(ctx, p.indexListing(func(have []byte) ([]byte, error) { return p.indexWith(ctx, have, entry) }))
}

// updateVersions changes both formats of gpu_driver_versions.
func (p *publisher) updateVersions(ctx context.Context, change edit) error {
	if err := p.update(ctx, listing{
		name: cosbucket.DriverVersionsName(p.Kernel), contentType: text, limit: maxVersions, shared: true,
		next: func(have []byte) ([]byte, error) { return editText(have, change) },
	}); err != nil {
		return err
	}
	return p.update(ctx, listing{
		name: cosbucket.DriverVersionsBinName(p.Kernel), contentType: "application/octet-stream", limit: maxVersions,
		shared: true, next: func(have []byte) ([]byte, error) { return editBinary(have, change) },
	})
}

func (p *publisher) indexListing(next func(have []byte) ([]byte, error)) listing {
	return listing{name: IndexName(p.Kernel), contentType: "application/json", limit: maxIndex, next: next}
}

// update changes an object. If the publisher may sign the new state (see maySign), update writes the signature before
// the object. So a reader never sees this state without its signature.
func (p *publisher) update(ctx context.Context, l listing) error {
	var before []byte
	signed := false
	changed, data, err := p.bucket.update(ctx, l.name, l.contentType, l.limit, func(have []byte) ([]byte, error) {
		before = have
		return l.next(have)
	}, func(data []byte) (err error) {
		if signed, err = p.maySign(ctx, l, before); err != nil || !signed {
			return err
		}
		digest := bytesObject(l.name, "", data).sha256
		o := p.signature(stateSignatureName(l.name, digest), digest, ObjectFacts{Object: l.name})
		existed, err := p.exists(ctx, o)
		if err != nil {
			return err
		}
		return p.create(ctx, o, existed)
	})
	if err != nil {
		return err
	}
	if changed && !signed {
		p.report.Unsigned = append(p.report.Unsigned, p.bucket.URL(l.name))
	}
	o := bytesObject(l.name, "", data)
	p.reportObject(l.name, o.size, o.sha256, !changed)
	return nil
}

// maySign reports whether the publisher may sign the new content of a listing. The signature covers the whole content,
// also what others wrote. So a shared listing must be new, or a trusted key must have signed the content before this
// change.
func (p *publisher) maySign(ctx context.Context, l listing, before []byte) (bool, error) {
	if !l.shared || before == nil {
		return true, nil
	}
	err := p.bucket.verifyState(ctx, p.verifier, p.Kernel, l.name, before)
	if isForeign(err) {
		return false, nil
	}
	return err == nil, err
}

// indexWith returns the published index with the entry added. have is nil if there is no index.
func (p *publisher) indexWith(ctx context.Context, have []byte, entry Entry) ([]byte, error) {
	x, err := p.readIndex(ctx, have)
	if err != nil {
		return nil, err
	}
	if x, err = x.withEntry(entry); err != nil {
		return nil, err
	}
	return x.marshal()
}

// readIndex verifies and parses the published index. An index that no trusted key signed is an error: the publisher
// signs the changed index as a whole, and would sign unverified entries.
func (p *publisher) readIndex(ctx context.Context, have []byte) (Index, error) {
	x, err := p.bucket.verifyIndex(ctx, p.verifier, p.Kernel, have)
	if isForeign(err) {
		return Index{}, fault.Wrap(fault.PublishRefused, fmt.Errorf("add an entry to the index: %w", err),
			"publish with the --key that signed the index; or, if the index is wrong, remove the index from the bucket by hand")
	}
	return x, err
}

// verifyIndex verifies and parses an index. have is the content; if it is nil, the result is an empty index.
func (b *Bucket) verifyIndex(ctx context.Context, v *trust.Verifier, k target.Kernel, have []byte) (Index, error) {
	if have == nil {
		return Index{Format: indexFormat, BuildID: k.BuildID, Board: k.Board}, nil
	}
	if err := b.verifyState(ctx, v, k, IndexName(k), have); err != nil {
		return Index{}, err
	}
	return ParseIndex(have)
}

// verifyState verifies the signature for a state of an object that changes. have is the object's content.
func (b *Bucket) verifyState(ctx context.Context, v *trust.Verifier, k target.Kernel, name string, have []byte) error {
	digest := bytesObject(name, "", have).sha256
	signature, _, err := b.readSmall(ctx, stateSignatureName(name, digest), maxSignature)
	if err != nil {
		return err
	}
	if signature == nil {
		return fault.Errorf(fault.Unverified, "read %s: the object has no signature", b.URL(name))
	}
	if _, err := Verify(v, signature, digest, ObjectFacts{Object: name, BuildID: k.BuildID, Board: k.Board}); err != nil {
		return fmt.Errorf("read %s: %w", b.URL(name), err)
	}
	return nil
}

// isForeign reports whether an error of verifyState or verifyIndex says that no trusted key signed the content.
func isForeign(err error) bool {
	return fault.Is(err, fault.Unverified) || fault.Is(err, fault.Mismatch)
}
