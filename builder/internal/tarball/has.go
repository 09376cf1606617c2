package tarball

import (
	"context"

	"github.com/prebake/prebake/pkg/target"
)

// Has reports whether a COS build's [Index] lists a driver made from this OCI artifact. It verifies no signature.
func Has(ctx context.Context, b *Bucket, k target.Kernel, d target.Driver, artifact string) (bool, error) {
	have, err := ArtifactOf(ctx, b, k, d)
	return have != "" && have == artifact, err
}

// ArtifactOf returns the digest of the OCI artifact from which a driver in a COS build's [Index] was made, or "". It
// verifies no signature.
func ArtifactOf(ctx context.Context, b *Bucket, k target.Kernel, d target.Driver) (string, error) {
	text, _, err := b.readSmall(ctx, IndexName(k), maxIndex)
	if err != nil || text == nil {
		return "", err
	}
	x, err := ParseIndex(text)
	if err != nil {
		return "", nil // Publish reports the error
	}
	for _, e := range x.Drivers {
		if e.Driver == d {
			return e.Artifact, nil
		}
	}
	return "", nil
}
