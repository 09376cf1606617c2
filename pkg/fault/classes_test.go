package fault_test

import (
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

// TestClassesOfBuilds checks that the classes of a failed build do not change: users' scripts, dashboards and the queue
// depend on them.
func TestClassesOfBuilds(t *testing.T) {
	t.Parallel()
	rows := []struct {
		kind  fault.Kind
		name  string
		exit  int
		retry bool
	}{
		{fault.InputMissing, "input-missing", 20, false},
		{fault.Checksum, "checksum-mismatch", 21, false},
		{fault.Unsupported, "unsupported", 22, false},
		{fault.APIBreak, "api-break", 23, false},
		{fault.CheckFailed, "check-failed", 24, false},
		{fault.LoadTestFailed, "load-test-failed", 25, false},
		{fault.OutOfMemory, "out-of-memory", 26, true},
		{fault.DiskFull, "disk-full", 27, true},
		{fault.TimedOut, "timed-out", 28, true},
		{fault.PublishRefused, "publish-refused", 29, false},
		{fault.Cancelled, "cancelled", 30, true},
	}
	for _, row := range rows {
		if row.kind.String() != row.name || row.kind.ExitCode() != row.exit || row.kind.Retryable() != row.retry {
			t.Errorf("%v: exit %d, retry %t; want %s, %d, %t", row.kind, row.kind.ExitCode(), row.kind.Retryable(), row.name,
				row.exit, row.retry)
		}
	}
}
