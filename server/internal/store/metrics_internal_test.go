package store

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
)

// TestCountOfManyBuilds counts builds while their number grows. With few ended builds, the counts are exact. With many,
// those of ended builds are a minute old at most, and those of open ones are exact.
func TestCountOfManyBuilds(t *testing.T) {
	t.Parallel()
	s, begin, board := openSQLite(t), time.Now(), 0
	add := func(state api.State, n int) {
		t.Helper()
		board++
		_, err := s.db.ExecContext(t.Context(), `
WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < $1)
INSERT INTO builds (build_id, board, kernel, driver, flavour, state, created_at)
SELECT n, $2, '{}', '535.1', 'open', $3, 0 FROM numbers`, n, board, string(state))
		if err != nil {
			t.Fatal(err)
		}
	}
	check := func(after time.Duration, queued, failed, published int) {
		t.Helper()
		got, err := s.countBuilds(t.Context(), begin.Add(after))
		want := map[api.State]int{api.Queued: queued, api.Failed: failed, api.Published: published}
		if d := cmp.Diff(want, got); err != nil || d != "" {
			t.Errorf("countBuilds() after %v = %v (-want +got):\n%s", after, err, d)
		}
	}
	add(api.Queued, 1)
	add(api.Failed, 1)
	add(api.Published, countedAlways-1)
	check(0, 1, 1, countedAlways-1)
	add(api.Failed, 1)
	check(time.Second, 1, 2, countedAlways-1)
	add(api.Failed, 1)
	add(api.Queued, 1)
	check(2*time.Second, 2, 2, countedAlways-1)
	check(61*time.Second, 2, 3, countedAlways-1)

	steps := plan(t, s, "SELECT state, COUNT(*) FROM "+openBuilds+" GROUP BY state")
	if !strings.Contains(steps, "SEARCH builds USING COVERING INDEX builds_by_state (state=?)") {
		t.Errorf("the plan of the count of open builds; want a search of the index:\n%s", steps)
	}
}
