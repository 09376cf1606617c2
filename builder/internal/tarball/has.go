package tarball

import (
	"context"
	"slices"

	"github.com/prebake/prebake/pkg/target"
)

// Has reports whether a COS build's [Index] lists a driver made from this OCI artifact. It verifies no signature.
func Has(ctx context.Context, b *Bucket, k target.Kernel, d target.Driver, artifact string) (bool, error) {
	text, _, err := b.readSmall(ctx, IndexName(k), maxIndex)
	if err != nil || text == nil {
		return false, err
	}
	x, err := ParseIndex(text)
	if err != nil {
		return false, nil // Publish reports the error
	}
	return slices.ContainsFunc(x.Drivers, func(e Entry) bool { return e.Driver == d && e.Artifact == artifact }), nil
}
