package store_test

import (
	"strconv"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// testQueueMetrics checks by how much the numbers of the metrics change. Their values depend on other tests, which
// share the database.
func testQueueMetrics(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	before, err := s.CountFailures(ctx)
	if err != nil {
		t.Fatal(err)
	}
	longAgo := time.UnixMicro(1).UTC() // earlier than the builds of all other tests
	// Builds of these two priorities wait behind all others, so OldestQueued must leave them out.
	for i, priority := range []int{queue.PriorityAgain, queue.PriorityWarning} {
		b, _, err := addBuild(ctx, s, api.Build{Kernel: kernelOf(id), State: api.Queued, CreatedAt: longAgo,
			Driver: target.Driver{Version: "1.2." + strconv.Itoa(i), Flavour: target.Open}, Priority: priority})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := s.OldestQueued(ctx); err != nil || got.Equal(longAgo) {
			t.Errorf("OldestQueued() with a build of priority %d = %v, %v; want it left out", priority, got, err)
		}
		b.State = api.Cancelled
		if err := s.Write(ctx, func(tx *store.Tx) error { return tx.SetBuild(ctx, b) }); err != nil {
			t.Fatal(err)
		}
	}
	old, _, err := addBuild(ctx, s, api.Build{Kernel: kernelOf(id), Driver: driver, State: api.Queued, CreatedAt: longAgo})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.OldestQueued(ctx); err != nil || !got.Equal(longAgo) {
		t.Errorf("OldestQueued() = %v, %v; want %v", got, err, longAgo)
	}
	old.State, old.Class = api.Failed, "api-break"
	if err := s.Write(ctx, func(tx *store.Tx) error { return tx.SetBuild(ctx, old) }); err != nil {
		t.Fatal(err)
	}
	if got, err := s.OldestQueued(ctx); err != nil || got.Equal(longAgo) {
		t.Errorf("OldestQueued() after the oldest failed = %v, %v", got, err)
	}
	after, err := s.CountFailures(ctx)
	if err != nil || after["api-break"] != before["api-break"]+1 {
		t.Errorf("CountFailures() = %v, %v; want one more of api-break than %v", after, err, before)
	}
	// Only the first failure of a cell with a class counts, until the cell has a success.
	for i, row := range []struct {
		state     api.State
		class     string
		apiBreaks int // more than before
		transient int
	}{
		{api.Failed, "api-break", 1, 0}, {api.Failed, "transient", 1, 1}, {api.Failed, "transient", 1, 1},
		{api.Failed, "api-break", 1, 1}, {api.Cancelled, "", 1, 1}, {api.Failed, "transient", 1, 1},
		{api.Published, "", 1, 1}, {api.Failed, "transient", 1, 2}, {api.Failed, "transient", 1, 2},
		{api.Failed, "api-break", 2, 2},
	} {
		b, _, err := addBuild(ctx, s, api.Build{Kernel: kernelOf(id), Driver: driver, State: api.Queued, CreatedAt: noon})
		if err != nil {
			t.Fatal(err)
		}
		b.State, b.Class = row.state, row.class
		if err := s.Write(ctx, func(tx *store.Tx) error { return tx.SetBuild(ctx, b) }); err != nil {
			t.Fatal(err)
		}
		after, err := s.CountFailures(ctx)
		if err != nil || after["api-break"] != before["api-break"]+row.apiBreaks ||
			after["transient"] != before["transient"]+row.transient {
			t.Errorf("CountFailures() after build %d, %s %s = %v, %v; want %d of api-break and %d of transient more than %v",
				i, row.state, row.class, after, err, row.apiBreaks, row.transient, before)
		}
	}
}
