package pipeline

import (
	"context"

	"github.com/prebake/prebake/builder/internal/tarball"
)

// checkLicence returns an error if the licence rule forbids the flavour in one of the destinations.
func (r *run) checkLicence(ctx context.Context, to *publication) error {
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

// checkStillPrivate checks after publishing that each destination is as private as the licence rule requires. A
// registry may create a public repository on the first push.
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
