package pipeline

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/prebake/prebake/builder/internal/twin"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
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

// labels reports whether this run gives labels in buckets.
func (r *run) labels() bool {
	return r.req.Flavour == target.Open && !r.cfg.LabelsLater && slices.ContainsFunc(r.cfg.Destinations, twin.Is)
}

// askLabels asks COS for the labels that it gives, and refuses those that the
// driver cannot have.
func (r *run) askLabels(ctx context.Context, kernels *cosbucket.Bucket) (err error) {
	for _, label := range r.cfg.Labels {
		if err := target.CheckLabel(label, r.res.Driver.Version); err != nil {
			return fault.Wrap(fault.Usage, err, "give a driver DEFAULT, LATEST, or the label of its own branch")
		}
	}
	if r.labels() {
		r.said, err = twin.Said(ctx, kernels, r.kernel.Kernel)
	}
	return err
}

// giveLabels gives the driver its labels in every bucket.
func (r *run) giveLabels(ctx context.Context) error {
	if !r.labels() {
		return nil
	}
	l := twin.Labelling{
		Kernel: r.kernel.Kernel, Builder: r.cfg.BuilderID, Declared: map[string]string{}, Said: r.said,
		Signer: r.signer, Verifier: r.verifier,
	}
	for _, label := range r.cfg.Labels {
		l.Declared[label] = r.res.Driver.Version
	}
	for _, b := range r.buckets {
		got, err := twin.Give(ctx, b, l)
		if err != nil {
			return err
		}
		r.res.Existed = r.res.Existed && got.Existed
		r.res.Labels = append(r.res.Labels, got)
	}
	return nil
}

// publishTwins puts the tarball into every bucket that lacks it.
func (r *run) publishTwins(ctx context.Context) (err error) {
	if len(r.buckets) == 0 {
		return nil
	}
	if r.res.Reused {
		if all, err := r.inBuckets(ctx, r.res.Digest); err != nil || all {
			return err
		}
	}
	scratch, cleanup, err := r.products.TempDir("twin-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cleanup()) }()
	release, err := r.twinFiles(ctx, scratch)
	if err != nil {
		return err
	}
	release.Kernel, release.Driver, release.Fingerprint, release.Artifact = r.kernel.Kernel, r.res.Driver, r.kernel.Fingerprint, r.res.Digest
	release.Signer, release.Verifier, release.GPUs, release.Scratch = r.signer, r.verifier, r.gpus, scratch
	for _, m := range r.release.Materials {
		if m.Digest != r.release.Digest {
			continue
		}
		release.Runfile = &twin.Runfile{SHA256: m.Digest, URI: m.URI}
		if path, ok := r.cfg.Cache.Blob(m.Digest); ok && r.cfg.WithRunfile {
			release.Runfile.Path, release.Runfile.Copy = path, true
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

// twinFiles says where modules and firmware lie: those that were made, or
// those of the artifact that is reused.
func (r *run) twinFiles(ctx context.Context, scratch string) (twin.Release, error) {
	dir := filepath.Join(scratch, "files")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return twin.Release{}, fault.CacheDisk(err)
	}
	if r.res.Reused {
		return twin.FromArtifact(ctx, r.places[0].repo, r.res.Digest, dir)
	}
	if err := r.layModules(dir); err != nil {
		return twin.Release{}, err
	}
	firmware, err := r.staged(ctx, bundle.LayerFirmware)
	if err != nil {
		return twin.Release{}, err
	}
	if _, err := os.Stat(filepath.Join(firmware, "firmware")); errors.Is(err, os.ErrNotExist) {
		firmware = ""
	}
	return twin.Release{Modules: filepath.Join(dir, "drivers"), Firmware: firmware}, nil
}
