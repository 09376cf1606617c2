package kube

import (
	"testing"
	"time"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
)

// TestConditionReason checks status and reason of the condition, because alerts select by them.
func TestConditionReason(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	n := &Node{now: func() time.Time { return now }}
	for _, row := range []struct {
		name           string
		state          state
		status, reason string
	}{
		{"ready", state{verdict: gpucheck.Verdict{State: gpucheck.Ready}}, "True", "DriverReady"},
		{"unusable", state{verdict: gpucheck.Verdict{State: gpucheck.Unusable}}, "False", "GPUUnusable"},
		{"no check since", state{verdict: gpucheck.Verdict{State: gpucheck.Ready}, since: now.Add(-time.Hour)}, "Unknown",
			"CheckFailed"},
	} {
		if c := n.condition(row.state, nil); c.Status != row.status || c.Reason != row.reason {
			t.Errorf("%s: condition = %s, %s; want %s, %s", row.name, c.Status, c.Reason, row.status, row.reason)
		}
	}
}
