package main

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// trims is a catalogue and its logs. It notes how old the records are that it has to remove.
type trims struct {
	audit, builds, logs []time.Duration
	// gone has the answers for builds 1 to 3: present, gone, and away.
	gone []bool
	last error
}

func (c *trims) TrimAudit(_ context.Context, before time.Time) error {
	c.audit = append(c.audit, time.Since(before))
	return nil
}

func (c *trims) TrimBuilds(_ context.Context, before time.Time) (int, error) {
	c.builds = append(c.builds, time.Since(before))
	return 1, nil
}

func (c *trims) Build(_ context.Context, id int64) (api.Build, error) {
	return api.Build{}, map[int64]error{
		2: fault.New(fault.NotFound, "build 2 does not exist", ""), 3: errors.New("the database is away"),
	}[id]
}

func (c *trims) Trim(before time.Time, gone func(build int64) (bool, error)) (int, error) {
	c.logs, c.gone = append(c.logs, time.Since(before)), nil
	for build := range int64(3) {
		var yes bool
		yes, c.last = gone(build + 1)
		c.gone = append(c.gone, yes)
	}
	return 0, c.last
}

// TestTrim checks that old records are removed at the start and once a day. Builds stay if that is wanted, and no log
// goes while the database is away.
func TestTrim(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		keep time.Duration
		want []time.Duration
	}{{0, nil}, {7 * day, []time.Duration{7 * day, 7 * day}}} {
		synctest.Test(t, func(t *testing.T) {
			ctx, stop := context.WithTimeout(t.Context(), day+time.Hour)
			defer stop()
			var c trims
			if err := trim(ctx, &c, &c, row.keep, slog.New(slog.DiscardHandler)); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff([]time.Duration{auditRetention, auditRetention}, c.audit); d != "" {
				t.Errorf("keep %s: ages of the audit log (-want +got):\n%s", row.keep, d)
			}
			if d := cmp.Diff([][]time.Duration{row.want, row.want}, [][]time.Duration{c.builds, c.logs}); d != "" {
				t.Errorf("keep %s: ages of builds and logs (-want +got):\n%s", row.keep, d)
			}
			if d := cmp.Diff([]bool{false, true, false}, c.gone); row.keep > 0 && (d != "" || c.last == nil) {
				t.Errorf("which builds are gone (-want +got), and the last error %v:\n%s", c.last, d)
			}
		})
	}
}
