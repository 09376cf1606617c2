package agent_test

import (
	"testing"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// TestRolledBackFromTheVersion rolls back the driver whose version is wanted. While no source responds, each run must
// say so, because another driver than the wanted one is active: not only the runs after the rollback.
func TestRolledBackFromTheVersion(t *testing.T) {
	t.Parallel()
	n, _, _, po, _ := noted(t)
	n.cfg.Wish = target.Wish(newVersion)
	n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
	n.inUse(t, "0")
	for i := range 2 {
		if r, err := n.runAs(t); !fault.Is(err, fault.Transient) || r.Verdict.Digest != po.Digest ||
			r.Verdict.State != gpucheck.Ready {
			t.Errorf("run %d = %s %s, %v; want the previous driver, and the error of the source", i, r.Verdict.State,
				r.Verdict.Digest, err)
		}
	}
}
