package fault_test

import (
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

// TestClassesOfBuilds checks that the fault classes of failed builds stay as they are. Users' scripts, dashboards and
// the queue depend on them.
func TestClassesOfBuilds(t *testing.T) {
	t.Parallel()
	rows := []struct {
		kind  fault.Kind
		name  string
		exit  int
		retry bool
		pass  bool
	}{
		{fault.Internal, "internal", 1, false, true},
		{fault.Transient, "transient", 10, true, true},
		{fault.Busy, "busy", 7, true, true},
		{fault.TooMany, "too-many", 15, true, true},
		{fault.WebPage, "web-page", 17, true, true},
		{fault.Unverified, "unverified", 4, false, false},
		{fault.InputMissing, "input-missing", 20, false, true},
		{fault.Checksum, "checksum-mismatch", 21, false, false},
		{fault.Unsupported, "unsupported", 22, false, false},
		{fault.APIBreak, "api-break", 23, false, false},
		{fault.CheckFailed, "check-failed", 24, false, false},
		{fault.LoadTestFailed, "load-test-failed", 25, false, false},
		{fault.OutOfMemory, "out-of-memory", 26, true, true},
		{fault.DiskFull, "disk-full", 27, true, true},
		{fault.TimedOut, "timed-out", 28, true, true},
		{fault.PublishRefused, "publish-refused", 29, false, false},
		{fault.Cancelled, "cancelled", 30, true, false},
	}
	for _, row := range rows {
		if row.kind.String() != row.name || row.kind.ExitCode() != row.exit || row.kind.Retryable() != row.retry ||
			row.kind.Passes() != row.pass {
			t.Errorf("%v: exit %d, retry %t, passes %t; want %s, %d, %t, %t", row.kind, row.kind.ExitCode(),
				row.kind.Retryable(), row.kind.Passes(), row.name, row.exit, row.retry, row.pass)
		}
	}
}
