package tarball

import (
	"context"
	"errors"
	"fmt"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// malformed is the cause of an error about an index that cannot be parsed.
type malformed struct{ error }

// Has reports whether a COS build's [Index] lists a driver made from this OCI artifact. It verifies no signature. For
// an index that cannot be parsed, the result is false, because the build reports the error.
func Has(ctx context.Context, b *Bucket, k target.Kernel, d target.Driver, artifact string) (bool, error) {
	have, err := ArtifactOf(ctx, b, k, d)
	if errors.As(err, new(malformed)) {
		return false, nil
	}
	return have != "" && have == artifact, err
}

// ArtifactOf returns the digest of the OCI artifact from which a driver in a COS build's [Index] was made, or "" if the
// index does not list the driver. It verifies no signature. If the index cannot be parsed, the error has kind
// PublishRefused.
func ArtifactOf(ctx context.Context, b *Bucket, k target.Kernel, d target.Driver) (string, error) {
	text, _, err := b.readSmall(ctx, IndexName(k), maxIndex)
	if err != nil || text == nil {
		return "", err
	}
	x, err := parseIndex(text)
	if err != nil {
		return "", fault.Wrap(fault.PublishRefused, fmt.Errorf("read index %s: %w", b.URL(IndexName(k)), malformed{err}),
			"publish with a builder of the version that wrote the index; or, if the index is damaged, remove it by hand")
	}
	for _, e := range x.Drivers {
		if e.Driver == d {
			return e.Artifact, nil
		}
	}
	return "", nil
}
