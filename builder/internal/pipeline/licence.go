package pipeline

import (
	"context"

	"github.com/prebake/prebake/builder/internal/tarball"
)

// mayPublish refuses destinations to which modules of this flavour may not go.
func (r *run) mayPublish(ctx context.Context, to *publication) error {
	for _, p := range to.destinations {
		if err := r.cfg.Licence.Check(ctx, p.name, p.repo, r.req.Flavour); err != nil {
			return err
		}
	}
	for _, b := range to.buckets {
		if err := r.cfg.Licence.Check(ctx, b.URL(""), b, r.req.Flavour); err != nil {
			return err
		}
	}
	return nil
}

// checkStillPrivate looks whether what was published is as private as it has to be: a registry may
// make a repository on push, for everybody.
func (r *run) checkStillPrivate(ctx context.Context, in *inputs, to *publication, a *artifact) error {
	for _, p := range to.destinations {
		if err := r.cfg.Licence.Published(ctx, p.name, p.repo, r.req.Flavour, a.digest); err != nil {
			return err
		}
	}
	for _, b := range to.buckets {
		if err := r.cfg.Licence.Published(ctx, b.URL(""), b, r.req.Flavour,
			tarball.TarballName(in.kernel.Kernel, in.driver)); err != nil {
			return err
		}
	}
	return nil
}
