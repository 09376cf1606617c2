package pipeline

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// inBuckets reports whether every bucket lists the artifact's tarball for this COS build. Each COS build has its own
// tarball, even if it shares the artifact.
func (o *publication) inBuckets(ctx context.Context, in *inputs, digest string) (bool, error) {
	for _, b := range o.buckets {
		if has, err := tarball.Has(ctx, b, in.kernel.Kernel, in.driver, digest); err != nil || !has {
			return false, err
		}
	}
	return true, nil
}

// wantsLabels reports whether this run sets labels in buckets.
func (r *run) wantsLabels() bool {
	return r.req.Flavour == target.Open && !r.cfg.LabelsLater && slices.ContainsFunc(r.cfg.Destinations, tarball.Is)
}

// readLabels reads which labels COS gives to which drivers on this COS build, or nil if this run sets no labels. If the
// driver cannot have one of Config.Labels, it returns an error.
func (r *run) readLabels(ctx context.Context, kernels *cosbucket.Bucket, in *inputs) (map[string]string, error) {
	for _, label := range r.cfg.Labels {
		if err := target.CheckLabel(label, in.driver.Version); err != nil {
			return nil, fault.Wrap(fault.Usage, err, "give a driver the label DEFAULT, LATEST or the name of its own branch")
		}
	}
	if !r.wantsLabels() {
		return nil, nil
	}
	return tarball.COSLabels(ctx, kernels, in.kernel.Kernel)
}

// setLabels sets the labels of this COS build's drivers in every bucket: COS's labels, and Config.Labels for the driver
// of this run.
func (r *run) setLabels(ctx context.Context, in *inputs, to *publication) error {
	if !r.wantsLabels() {
		return nil
	}
	l := tarball.Labelling{
		Kernel: in.kernel.Kernel, Builder: r.cfg.BuilderID, Declared: map[string]string{}, FromCOS: in.labels,
		Signer: to.signer, Verifier: to.verifier,
	}
	for _, label := range r.cfg.Labels {
		l.Declared[label] = in.driver.Version
	}
	for _, b := range to.buckets {
		got, err := tarball.SetLabels(ctx, b, l)
		if err != nil {
			return err
		}
		r.res.Existed = r.res.Existed && got.Existed
		r.res.Labels = append(r.res.Labels, got)
		r.logUnsigned(got.Unsigned)
	}
	return nil
}

// publishTarballs publishes the tarball to every bucket that lacks it.
func (r *run) publishTarballs(ctx context.Context, in *inputs, to *publication, m *modules, a *artifact) (err error) {
	if len(to.buckets) == 0 {
		return nil
	}
	if a.wasPublished() {
		if all, err := to.inBuckets(ctx, in, a.digest); err != nil || all {
			return err
		}
	}
	scratch, cleanup, err := r.products.TempDir("twin-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cleanup()) }()
	release, err := r.tarballFiles(ctx, in, to, m, a, scratch)
	if err != nil {
		return err
	}
	release.Kernel, release.Driver, release.Fingerprint, release.Artifact =
		in.kernel.Kernel, in.driver, in.kernel.Fingerprint, a.digest
	release.Signer, release.Verifier, release.GPUs, release.Scratch = to.signer, to.verifier, to.gpus, scratch
	for _, m := range in.release.Materials {
		if m.Digest != in.release.Digest {
			continue
		}
		release.Runfile = &tarball.Runfile{SHA256: m.Digest, URI: m.URI}
		if path, ok := r.cfg.Cache.Blob(m.Digest); ok && r.cfg.WithRunfile {
			release.Runfile.Path, release.Runfile.Copy = path, true
		}
	}
	for _, b := range to.buckets {
		report, err := tarball.Publish(ctx, b, release)
		if err != nil {
			return fmt.Errorf("publish tarball: %w", err)
		}
		r.res.Existed = r.res.Existed && report.Existed
		r.res.Tarballs = append(r.res.Tarballs, report)
		r.logUnsigned(report.Unsigned)
	}
	return nil
}

func (r *run) logUnsigned(urls []string) {
	for _, url := range urls {
		fmt.Fprintf(r.log, "%s has no signature, because other writers wrote a part of this object\n", url)
	}
}

// tarballFiles returns the folders with modules and firmware, from this build or from the artifact that it reuses.
func (r *run) tarballFiles(ctx context.Context, in *inputs, to *publication, m *modules, a *artifact,
	scratch string) (tarball.Release, error) {
	dir := filepath.Join(scratch, "files")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return tarball.Release{}, fault.CacheDisk(err)
	}
	if a.wasPublished() {
		return tarball.FromArtifact(ctx, to.destinations[0].repo, a.digest, dir)
	}
	if err := r.copyModules(m, dir); err != nil {
		return tarball.Release{}, err
	}
	firmware, err := r.stagedFolder(ctx, in, bundle.LayerFirmware)
	if err != nil {
		return tarball.Release{}, err
	}
	if _, err := os.Stat(filepath.Join(firmware, "firmware")); errors.Is(err, os.ErrNotExist) {
		firmware = ""
	}
	return tarball.Release{Modules: filepath.Join(dir, "drivers"), Firmware: firmware}, nil
}
