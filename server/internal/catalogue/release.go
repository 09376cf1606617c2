package catalogue

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// Announce looks up a COS build, records its kernels, and queues what the wish lists want of it. The caller does not
// wait for a plan of all other COS builds. A second call changes nothing.
func (c *Catalogue) Announce(ctx context.Context, buildID string) (api.Release, error) {
	if _, err := target.ParseKernel(buildID, "lakitu"); err != nil {
		return api.Release{}, fault.Wrap(fault.Usage, err, "")
	}
	if c.Mirror == nil {
		return api.Release{}, fault.New(
			fault.Unsupported,
			"look up COS build "+buildID+": this server has no --kernel-mirror",
			"start the server with the URL of a bucket of COS releases: --kernel-mirror URL",
		)
	}
	if err := c.lookUp(ctx, buildID); err != nil {
		return api.Release{}, err
	}
	// PlanSoon plans all COS builds. It also tries the cells that planRelease did not queue.
	defer c.PlanSoon()
	if err := c.planRelease(ctx, buildID); err != nil {
		c.Log.WarnContext(ctx, "plan of the wish lists incomplete", "err", err)
	}
	return c.Release(ctx, buildID)
}

// planRelease queues the wanted cells of one COS build. It records nothing about the wish lists; [Catalogue.Plan] does.
func (c *Catalogue) planRelease(ctx context.Context, buildID string) error {
	lists, err := c.Store.WishLists(ctx)
	if err != nil || len(lists) == 0 {
		return err
	}
	known, err := c.planView(ctx, buildID)
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range lists {
		p, err := known.expand(ctx, &l)
		if err != nil {
			errs = append(errs, fmt.Errorf("plan the wish list %s: %w", l.Name, err))
			continue
		}
		for _, cell := range p.Cells {
			if cell.Problem != nil || cell.Kernel.BuildID != buildID {
				continue
			}
			if _, err := c.queueCell(ctx, cell, known); err != nil {
				errs = append(errs, fmt.Errorf("plan the wish list %s: %s: %w", l.Name, cell, err))
				if fault.Is(err, fault.Transient) { // the other cells would fail, too
					return errors.Join(errs...)
				}
			}
		}
	}
	return errors.Join(errs...)
}

// Release returns a COS build with the states of its cells.
func (c *Catalogue) Release(ctx context.Context, buildID string) (api.Release, error) {
	kernels, _, err := c.Store.Kernels(ctx, store.KernelFilter{BuildID: buildID}, store.Page{Limit: MaxLimit})
	if err != nil {
		return api.Release{}, err
	}
	if len(kernels) == 0 || buildID == "" {
		return api.Release{}, fault.New(
			fault.NotFound,
			fmt.Sprintf("COS build %.80q is not in the catalogue", buildID),
			"announce the COS build: server announce BUILD_ID",
		)
	}
	r := api.Release{BuildID: buildID, Kernels: kernels, SeenAt: kernels[0].FirstSeenAt}
	if r.Cells, _, err = c.Cells(ctx, store.KernelFilter{BuildID: buildID}, "",
		store.Page{Limit: MaxLimitCells}); err != nil {
		return r, err
	}
	seen := map[string]time.Time{}
	for _, k := range kernels {
		seen[k.String()] = k.FirstSeenAt
		if k.FirstSeenAt.Before(r.SeenAt) {
			r.SeenAt = k.FirstSeenAt
		}
	}
	var took []time.Duration
	for _, cell := range r.Cells {
		switch {
		case cell.State == api.Queued || cell.State == api.Building:
			r.Open++
		case cell.State == api.Published:
			r.Ready++
		}
		if at := seen[cell.Kernel.String()]; cell.ReadyAt != nil && !cell.ReadyAt.Before(at) {
			took = append(took, cell.ReadyAt.Sub(at))
		}
	}
	slices.Sort(took)
	r.Times = durations(took)
	return r, nil
}
