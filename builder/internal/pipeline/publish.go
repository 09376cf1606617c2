package pipeline

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/fault"
)

// publish sends the artifact and its statements to each destination that lacks them.
func (r *run) publish(ctx context.Context, in *inputs, to *publication, m *modules, a *artifact) (string, error) {
	all := publish.Artifact{Image: a.image, Identity: a.identity, Kernel: in.kernel.Kernel, Bundles: a.bundles,
		Verifier: to.verifier, Log: a.log, RenewAfter: r.renewAfter(in, m),
		Pause: pause}
	if !a.wasPublished() {
		if err := to.checkTaken(ctx, in, all, a.digest); err != nil {
			return "", err
		}
	}
	r.res.Existed = true
	for _, p := range to.destinations {
		existed, err := true, error(nil)
		if a.wasPublished() {
			err = publish.Attest(ctx, p.repo, a.digest, all)
		} else {
			_, existed, err = publish.Publish(ctx, p.repo, all)
		}
		if err != nil {
			// If a destination refuses a layer, the cause may be a damaged file in the cache.
			if damaged := r.checkLayers(ctx, a); damaged != nil {
				err = fmt.Errorf("%w; this may be why the destination refused the artifact: %w", damaged, err)
			}
			return "", fmt.Errorf("publish to %s: %w", p.name, err)
		}
		r.res.Existed = r.res.Existed && existed
		r.res.Repositories = append(r.res.Repositories, p.repo.Name())
	}
	if err := r.publishSymbols(ctx, to, m, a); err != nil {
		return "", err
	}
	if err := r.publishTarballs(ctx, in, to, m, a); err != nil {
		return "", err
	}
	if err := r.setLabels(ctx, in, to); err != nil {
		return "", err
	}
	if err := r.checkStillPrivate(ctx, in, to, a); err != nil {
		return "", err
	}
	if err := r.publishDeltas(ctx, in, to, a); err != nil {
		return "", err
	}
	note := fmt.Sprintf("%s to %d destination(s)", a.digest[:19], len(to.destinations)+len(to.buckets))
	if n := len(r.res.Deltas); n > 0 {
		note += fmt.Sprintf(", %d delta(s)", n)
	}
	if r.res.Existed {
		note += ", published there before"
	}
	return note, nil
}

// checkTaken returns an error if one of several destinations has another artifact under this name, and so would refuse
// this one. Without this check, the destinations before it would already have got the new artifact.
func (o *publication) checkTaken(ctx context.Context, in *inputs, all publish.Artifact, digest string) error {
	if len(o.destinations)+len(o.buckets) < 2 {
		return nil
	}
	for _, p := range o.destinations {
		if err := publish.CheckTags(ctx, p.repo, digest, all); err != nil {
			return fmt.Errorf("publish to %s: %w", p.name, err)
		}
	}
	for _, b := range o.buckets {
		have, err := tarball.ArtifactOf(ctx, b, in.kernel.Kernel, in.driver)
		if err != nil {
			return err
		}
		if have != "" && have != digest {
			return fault.New(fault.PublishRefused,
				fmt.Sprintf("%s already has driver %s from artifact %s; this build made %s",
					b.URL(tarball.IndexName(in.kernel.Kernel)), in.driver, have, digest),
				"equal inputs give equal digests; to see what differs, run \"builder reproduce\" on the published artifact")
		}
	}
	return nil
}

// pause waits for a random time of two to four seconds, so that two builders that wrote at the same time probably do
// not do so again.
func pause(ctx context.Context) error {
	timer := time.NewTimer(2*time.Second + rand.N(2*time.Second))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// renewAfter returns the age at which a provenance in a destination gets a successor. It is 0 if this run neither
// compiled the modules nor used Google's modules. Such a run must not attest a new build.
func (r *run) renewAfter(in *inputs, m *modules) time.Duration {
	if m == nil || len(m.madeOf) == 0 && in.prebuilt == nil {
		return 0
	}
	return min(cmp.Or(r.cfg.RebuildAfter, defaultRenewAfter), defaultRenewAfter)
}

// checkLayers returns an error if a layer in the cache changed since it was packed.
func (r *run) checkLayers(ctx context.Context, a *artifact) error {
	if a.wasPublished() {
		return nil
	}
	for _, l := range a.layers {
		if err := r.products.Recheck(ctx, l.Path); err != nil {
			return fmt.Errorf("read the %s layer in the cache: %w", l.Kind, err)
		}
	}
	return nil
}

// publishDeltas attaches deltas for nodes that have the modules of an earlier COS build. Deltas are optional, so
// publishDeltas returns an error only if the context ends.
func (r *run) publishDeltas(ctx context.Context, in *inputs, to *publication, a *artifact) error {
	for _, p := range to.destinations {
		made, err := publish.Deltas(ctx, p.repo, a.digest, in.kernel.Kernel, in.driver, r.cfg.Deltas)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			r.progress("publish")(fmt.Sprintf("no delta in %s: %v", p.name, err))
		}
		for _, d := range made {
			fmt.Fprintf(r.log, "delta from the modules of %s: %d bytes\n", d.From, d.Size)
		}
		r.res.Deltas = append(r.res.Deltas, made...)
	}
	return nil
}
