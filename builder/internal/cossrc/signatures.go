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

// Signatures are Google's signatures of the modules that Google compiled, for one driver version and COS build.
type Signatures struct {
	// Archive is the content of nvidia-drivers-<VERSION>-signature.tar.gz, or of the archive under its older name.
	Archive []byte
	// TrustedKey is the content of trusted_key.pem, the root certificate in the kernel, or nil if the bucket has none.
	TrustedKey []byte
	// Materials are the objects that were read, the archive first.
	Materials []Material
}

// Limits in bytes. A real archive has a few KB for each module and firmware image. Old archives also contain the
// program sign-file.
const (
	maxSignatures = 16 << 20
	maxTrustedKey = 1 << 20
)

// FetchSignatures fetches Google's signatures for a driver version. It returns nil if the COS build has no signatures
// for this version.
func FetchSignatures(ctx context.Context, b *cosbucket.Bucket, cache *cas.Cache, kernel target.Kernel,
	version string) (*Signatures, error) {
	f := &fetcher{Fetcher: input.Fetcher{Source: b, Cache: cache}, bucket: b, kernel: kernel}
	for _, name := range cosbucket.SignatureNames(kernel, version) {
		archive, m, err := f.readSmall(ctx, name, maxSignatures)
		if fault.Is(err, fault.InputMissing) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("fetch Google's files for kernel %s: %w", kernel, err)
		}
		s := &Signatures{Archive: archive, Materials: []Material{m}}
		if s.TrustedKey, m, err = f.trustedKey(ctx); err != nil {
			return nil, fmt.Errorf("fetch Google's files for kernel %s: %w", kernel, err)
		}
		if s.TrustedKey != nil {
			s.Materials = append(s.Materials, m)
		}
		return s, nil
	}
	return nil, nil
}

// SignedDriver is a driver whose open modules Google compiled and signed for one COS build.
type SignedDriver struct {
	// Archive is the path of nvidia-drivers-<VERSION>.tgz in the cache.
	Archive string
	// TrustedKey has the same meaning as in [Signatures].
	TrustedKey []byte
	// Materials are the objects that were read, the archive first.
	Materials []Material
}

// FetchSignedDriver fetches the driver that Google compiled and signed for a COS build. If the COS build has no signed
// driver of this version, the error is fault.InputMissing.
func FetchSignedDriver(ctx context.Context, b *cosbucket.Bucket, cache *cas.Cache, kernel target.Kernel, version string,
	say func(string)) (*SignedDriver, error) {
	f := &fetcher{Fetcher: input.Fetcher{Source: b, Cache: cache, Progress: say}, bucket: b, kernel: kernel}
	archive, err := f.fetchFile(ctx, cosbucket.SignedDriverName(kernel, version))
	if fault.Is(err, fault.InputMissing) {
		err = fault.Wrap(fault.InputMissing, err,
			"choose a driver version that COS offers for this COS build, or build without --google-modules")
	}
	if err != nil {
		return nil, fmt.Errorf("fetch Google's files for kernel %s: %w", kernel, err)
	}
	d := &SignedDriver{Archive: archive.at, Materials: []Material{archive.material}}
	var m Material
	if d.TrustedKey, m, err = f.trustedKey(ctx); err != nil {
		return nil, fmt.Errorf("fetch Google's files for kernel %s: %w", kernel, err)
	}
	if d.TrustedKey != nil {
		d.Materials = append(d.Materials, m)
	}
	return d, nil
}

// fetchFile fetches an object into the cache without unpacking it.
func (f *fetcher) fetchFile(ctx context.Context, name string) (p part, err error) {
	err = f.tryLayouts(name, func(at string) error {
		p, err = getFile(ctx, &f.Fetcher, at)
		return err
	})
	return p, err
}

// trustedKey reads trusted_key.pem. It returns nil if the COS build has no trusted_key.pem.
func (f *fetcher) trustedKey(ctx context.Context) ([]byte, Material, error) {
	key, m, err := f.readSmall(ctx, cosbucket.TrustedKeyName(f.kernel), maxTrustedKey)
	if fault.Is(err, fault.InputMissing) {
		return nil, Material{}, nil
	}
	return key, m, err
}
