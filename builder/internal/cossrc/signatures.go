package cossrc

import (
	"context"
	"fmt"

	"github.com/prebake/prebake/builder/internal/input"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Signatures are Google's, over the modules of one driver version that Google
// compiled for one COS build.
type Signatures struct {
	// Archive is nvidia-drivers-<VERSION>-signature.tar.gz, or its older name.
	Archive []byte
	// TrustedKey is trusted_key.pem, the root certificate that the kernel was
	// built with; nil where the bucket has none.
	TrustedKey []byte
	// Materials are these objects, the archive first.
	Materials []Material
}

// Bounds: real archives have some KB for each module and firmware image, old
// ones a sign-file besides.
const (
	maxSignatures = 16 << 20
	maxTrustedKey = 1 << 20
)

// FetchSignatures reads the signatures that a COS build ships for a driver
// version; nil is none.
func FetchSignatures(ctx context.Context, b *cosbucket.Bucket, cache *cas.Cache, kernel target.Kernel, version string) (*Signatures, error) {
	f := &fetcher{Fetcher: input.Fetcher{Source: b, Cache: cache}, bucket: b, kernel: kernel}
	for _, name := range cosbucket.SignatureNames(kernel, version) {
		archive, m, err := f.small(ctx, name, maxSignatures)
		if fault.Is(err, fault.InputMissing) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("kernel %s: %w", kernel, err)
		}
		s := &Signatures{Archive: archive, Materials: []Material{m}}
		key, m, err := f.small(ctx, cosbucket.TrustedKeyName(kernel), maxTrustedKey)
		switch {
		case fault.Is(err, fault.InputMissing):
			return s, nil
		case err != nil:
			return nil, fmt.Errorf("kernel %s: %w", kernel, err)
		}
		s.TrustedKey, s.Materials = key, append(s.Materials, m)
		return s, nil
	}
	return nil, nil
}
