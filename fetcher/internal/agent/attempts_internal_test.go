package agent

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/install"
)

// TestByNeed checks the order of the records of load attempts. If there are too many records, a node drops those at the
// end of this order.
func TestByNeed(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	ago := func(hours int) time.Time { return now.Add(-time.Duration(hours) * time.Hour) }
	digest := func(i int) string { return fmt.Sprintf("sha256:%064x", i) }
	// The eight newest records have one failure each. A node keeps the newest records, although other records matter more.
	all := attempts{}
	for i := range maxRecent {
		all[digest(i)] = &attempt{At: ago(i), Failures: 1}
	}
	want := []*attempt{
		{At: ago(900), Open: true},
		{At: now.Add(time.Hour), Next: true}, // a record from the future: the clock was wrong
		{At: ago(901), ByHand: true},         // the active driver
		{At: ago(902), Crashes: 1},           // the previous driver
		{At: ago(20), Crashes: 2},
		{At: ago(30), ByHand: true},
		{At: now.Add(3 * time.Hour), ByHand: true},
		{At: now.Add(2 * time.Hour), ByHand: true},
		{At: ago(10), Failures: 2},
		{At: ago(40), Failures: 2},
		{At: now.Add(time.Hour), Failures: 2},
	}
	var order []string
	for i := range maxRecent + len(want) {
		if order = append(order, digest(i)); i >= maxRecent {
			all[digest(i)] = want[i-maxRecent]
		}
	}
	at := func(i int) string { return "sets/" + digest(i)[len("sha256:"):] }
	got := all.byNeed(now, install.Pointers{Current: at(maxRecent + 2), Previous: at(maxRecent + 3)})
	if diff := cmp.Diff(order, got); diff != "" {
		t.Errorf("byNeed (-want +got):\n%s", diff)
	}
	// The clock now shows 1970, so all former records seem to be from the future. The node must keep a new record
	// nevertheless.
	fresh := digest(99)
	all[fresh] = &attempt{At: time.Unix(5, 0), Failures: 1}
	if i := slices.Index(all.byNeed(time.Unix(6, 0), install.Pointers{}), fresh); i >= maxRecent {
		t.Errorf("with the clock in 1970, the new record is at place %d; want it among the first %d", i, maxRecent)
	}
}

// TestPrecious checks which records must not be lost. An open record of another boot is a crash that is not counted
// yet.
func TestPrecious(t *testing.T) {
	t.Parallel()
	for i, row := range []struct {
		at   attempt
		want bool
	}{
		{attempt{Failures: 1}, false}, {attempt{Open: true, BootID: "now"}, false}, {attempt{Crashes: 1}, true},
		{attempt{Open: true, BootID: "before"}, true}, {attempt{ByHand: true}, true}, {attempt{BootID: "before"}, false},
	} {
		if got := (attempts{"sha256:ab": &row.at}).precious("now"); got != row.want {
			t.Errorf("row %d: precious = %t; want %t", i, got, row.want)
		}
	}
}
