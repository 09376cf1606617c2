package catalogue_test

import (
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
)

// TestWarnings lets builds of an early-warning entry fail. These failures must be listed as warnings, and must not
// count in the coverage.
func TestWarnings(t *testing.T) {
	t.Parallel()
	c, q := open(t)
	ctx := t.Context()
	for id, milestone := range map[string]int{"17800.0.1": 109, "19999.0.1": 133, "19999.0.2": 133} {
		k := api.Kernel{Kernel: target.Kernel{BuildID: id, Board: "lakitu", Milestone: milestone}, Default: v261}
		if err := c.RecordKernel(ctx, k); err != nil {
			t.Fatal(err)
		}
	}
	text := "version: 1\nkernels:\n  - {milestone: 109, latest: 1}\n  - {milestone: 133, latest: 2, earlyWarning: " +
		"true}\n" +
		"drivers: [default]\nflavours: [open]\n"
	if _, err := c.PutWishList(ctx, "production", text, 0); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Plan(ctx); err != nil || n != 3 {
		t.Fatalf("Plan() = %d, %v; want 3", n, err)
	}
	for i, job := range q.jobs {
		class := "api-break"
		if job.BuildID == "19999.0.1" {
			class = "check-failed"
		}
		update(t, c, job.Build, api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1})
		update(t, c, job.Build, api.BuildUpdate{State: api.Failed, Class: class, Error: "nv.c:1:2: error: x"})
		if got := q.priorities[i]; (got == 4) != (job.BuildID != "17800.0.1") {
			t.Errorf("%s is queued with priority %d; want 4 for early warnings only", job.BuildID, got)
		}
	}
	all, err := c.Warnings(ctx)
	if err != nil || len(all) != 2 || all[0].Kernel.BuildID != "19999.0.2" || all[0].Class != "api-break" ||
		all[0].Kernel.Milestone != 133 ||
		all[1].Kernel.BuildID != "19999.0.1" || all[1].Class != "check-failed" || all[1].Since.IsZero() ||
		all[1].LastSeenAt.Before(all[1].Since) {
		t.Errorf("Warnings() = %+v, %v; want the two of milestone 133, newest first", all, err)
	}
	if err := c.Measure(ctx); err != nil {
		t.Fatal(err)
	}
	if v, err := c.Coverage(ctx); err != nil || v.Total.Wanted != 1 || v.Total.Failed != 1 {
		t.Errorf("Coverage() = %+v, %v; want the one cell of milestone 109", v, err)
	}
}
