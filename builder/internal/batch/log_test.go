package batch_test

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/builder/internal/batch"
	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/timeline"
)

// The log of a failed build stays while later passes only repeat its failure, and such a failure counts as known. The
// next real attempt replaces the log.
func TestRememberedKeepsLog(t *testing.T) {
	t.Parallel()
	w := &world{t: t}
	cfg := w.config()
	cfg.Failures = nil
	for i, row := range []struct {
		says       string
		remembered bool
		want       string
	}{
		{"why it failed", false, "why it failed"},
		{"not built again", true, "why it failed"},
		{"not built again", true, "why it failed"},
		{"failed anew", false, "failed anew"},
	} {
		cfg.Make = func(_ context.Context, _ plan.Cell, log io.Writer, _ *timeline.Run) (*pipeline.Result, error) {
			if _, err := io.WriteString(log, row.says); err != nil {
				t.Error(err)
			}
			return &pipeline.Result{Remembered: row.remembered},
				fault.New(fault.LoadTestFailed, row.says, "")
		}
		j := batch.Run(t.Context(), cfg, cells("1.0.1 5.1-open")).Jobs[0]
		if j.State != batch.Failed || j.Known != row.remembered {
			t.Errorf("pass %d: %s, known %t; want failed, known %t", i, j.State, j.Known, row.remembered)
		}
		if got, err := os.ReadFile(j.Log); err != nil || string(got) != row.want {
			t.Errorf("pass %d: log %q, %v; want %q", i, got, err, row.want)
		}
		if files, err := filepath.Glob(filepath.Join(cfg.Logs, "*")); err != nil || len(files) > 1 {
			t.Errorf("pass %d: logs %v, %v; want one", i, files, err)
		}
	}
}
