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

// TestAfterLongHang checks that a check that hung for hours does not hide the next hang for as long.
func TestAfterLongHang(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var c gpucheck.CheckTimer
	hangs := func(took time.Duration) bool {
		c.Start(now)
		now = now.Add(took)
		hung := !c.HungSince(now).IsZero()
		c.Answer(now)
		return hung
	}
	if !hangs(3 * time.Hour) {
		t.Error("a check of 3 hours does not hang")
	}
	for range 12 {
		hangs(2 * time.Second)
	}
	if !hangs(61 * time.Second) {
		t.Error("12 checks later, a check of 61 s does not hang")
	}
}
