package pipeline

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/prebake/prebake/builder/internal/twin"
	"github.com/prebake/prebake/pkg/bundle"
)

// openBucket opens a destination for tarball twins.
func (r *run) openBucket(ctx context.Context, dest string) error {
	b, err := twin.Open(ctx, dest)
	if err != nil {
		return err
	}
	r.buckets = append(r.buckets, b)
	return nil
}

func (r *run) closeBuckets() error {
	var errs []error
	for _, b := range r.buckets {
		errs = append(errs, b.Close())
	}
	return errors.Join(errs...)
}

// inBuckets reports whether every bucket lists the artifact's twin for this COS
// build: each build has tarballs of its own there, whatever its fingerprint.
func (r *run) inBuckets(ctx context.Context, digest string) (bool, error) {
	for _, b := range r.buckets {
		if has, err := twin.Has(ctx, b, r.kernel.Kernel, r.res.Driver, digest); err != nil || !has {
			return false, err
		}
	}
	return true, nil
}

// publishTwins puts the tarball into every bucket.
func (r *run) publishTwins(ctx context.Context) (err error) {
	if len(r.buckets) == 0 || r.res.Reused { // reuse asked inBuckets
		return nil
	}
	modules, cleanup, err := r.modulesFolder()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cleanup()) }()
	firmware, err := r.staged(ctx, bundle.LayerFirmware)
	if err != nil {
		return err
	}
	scratch, cleanScratch, err := r.products.TempDir("twin-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cleanScratch()) }()
	release := twin.Release{
		Kernel: r.kernel.Kernel, Driver: r.res.Driver, Fingerprint: r.kernel.Fingerprint,
		Modules: filepath.Join(modules, "drivers"), Firmware: firmware, Artifact: r.res.Digest,
		Signer: r.signer, Verifier: r.verifier, GPUs: r.gpus, Scratch: scratch,
	}
	if _, err := os.Stat(filepath.Join(firmware, "firmware")); errors.Is(err, os.ErrNotExist) {
		release.Firmware = ""
	}
	for _, m := range r.release.Materials {
		if m.Digest == r.release.Digest {
			release.Runfile = &twin.Runfile{SHA256: m.Digest, URI: m.URI}
		}
	}
	for _, b := range r.buckets {
		report, err := twin.Publish(ctx, b, release)
		if err != nil {
			return fmt.Errorf("publish tarball: %w", err)
		}
		r.res.Existed = r.res.Existed && report.Existed
		r.res.Twins = append(r.res.Twins, report)
	}
	return nil
}
