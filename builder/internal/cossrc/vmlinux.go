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

// hasVMLinux reports whether the bucket has vmlinux. It does not read vmlinux, which has hundreds of megabytes.
func (f *fetcher) hasVMLinux(ctx context.Context) (bool, error) {
	err := f.tryLayouts(cosbucket.VMLinuxName(f.kernel), func(at string) error {
		r, _, err := f.bucket.Get(ctx, at)
		if err != nil {
			return err
		}
		return r.Close()
	})
	if fault.Is(err, fault.InputMissing) {
		return false, nil
	}
	return err == nil, err
}

// FetchVMLinux fetches vmlinux, the linked kernel, into the cache and returns its path. If the bucket has no vmlinux,
// the error is fault.InputMissing. FetchVMLinux calls say with its progress, one line at a time; say may be nil.
func FetchVMLinux(ctx context.Context, b *cosbucket.Bucket, cache *cas.Cache, kernel target.Kernel,
	say func(string)) (file string, m Material, err error) {
	f := &fetcher{Fetcher: input.Fetcher{Source: b, Cache: cache, Progress: say}, bucket: b, kernel: kernel}
	err = f.tryLayouts(cosbucket.VMLinuxName(kernel), func(at string) error {
		sum, err := f.ChecksumFile(ctx, at)
		if err != nil {
			return err
		}
		if m, file, err = f.Blob(ctx, at, sum); err != nil {
			return err
		}
		return f.Recheck(ctx, at, sum, m)
	})
	if err != nil {
		return "", m, fmt.Errorf("fetch vmlinux of kernel %s: %w", kernel, err)
	}
	return file, m, nil
}
