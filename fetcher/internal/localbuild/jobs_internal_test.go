package localbuild

import "testing"

func TestJobs(t *testing.T) {
	t.Parallel()
	const gib = 1 << 30
	for _, row := range []struct {
		processors int
		limit      int64
		want       int
	}{
		{16, 0, 16}, {1, 0, 1}, {16, 64 << 20, 1}, {16, gib, 1}, {16, gib + gib/2, 1}, {16, 3 * gib, 2},
		{16, 9 * gib, 8}, {2, 64 * gib, 2},
	} {
		if got := jobs(row.processors, row.limit); got != row.want {
			t.Errorf("jobs(%d, %d) = %d; want %d", row.processors, row.limit, got, row.want)
		}
	}
}
