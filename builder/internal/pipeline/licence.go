package pipeline

import (
	"context"

	"github.com/prebake/prebake/builder/internal/twin"
)

// mayGo refuses destinations to which modules of this flavour may not go.
func (r *run) mayGo(ctx context.Context, to *outlet) error {
	for _, p := range to.places {
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

// stayed looks whether what was published is as private as it has to be: a registry may
// make a repository on push, for everybody.
func (r *run) stayed(ctx context.Context, in *inputs, to *outlet, a *artifact) error {
	for _, p := range to.places {
		if err := r.cfg.Licence.Published(ctx, p.name, p.repo, r.req.Flavour, a.digest); err != nil {
			return err
		}
	}
	for _, b := range to.buckets {
		if err := r.cfg.Licence.Published(ctx, b.URL(""), b, r.req.Flavour, twin.TarballName(in.kernel.Kernel, in.driver)); err != nil {
			return err
		}
	}
	return nil
}
