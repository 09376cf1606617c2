package gpucheck_test

import (
	"testing"
	"time"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
)

// TestSlowNowAndThen checks a machine that answers slowly in every third check, for example because no program uses its
// GPUs then. Only its first slow check may count as a hang.
func TestSlowNowAndThen(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var c gpucheck.CheckTimer
	for i, took := range []time.Duration{90, 2, 2, 90, 2, 2, 90} {
		c.Start(now)
		now = now.Add(took * time.Second)
		if hung := !c.HungSince(now).IsZero(); hung != (i == 0) {
			t.Errorf("check %d, which takes %d s, hangs: %t; want only the first to hang", i, took, hung)
		}
		c.Answer(now)
		now = now.Add(time.Minute)
	}
}
