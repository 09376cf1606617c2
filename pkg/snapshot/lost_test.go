package snapshot_test

import (
	"os"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/testkit/snapshots"
)

// TestLostFolder replaces a lost folder in the way that docs/how-to/snapshot.md describes. The new folder needs only
// the old roots, and a version of the list above the last one.
func TestLostFolder(t *testing.T) {
	t.Parallel()
	f := snapshots.New(t, start)
	publish(t, f, start, snapshot.Published)
	n := newNode(t, f)
	for i := range 9 {
		f.Refresh(t, start.Add(time.Duration(i)*time.Hour))
	}
	n.now = start.AddDate(0, 0, 1)
	before, err := n.client(t, f.Dir).Refresh(t.Context())
	check(t, err)

	check(t, os.RemoveAll(f.Dir))
	check(t, os.Mkdir(f.Dir, 0o755))
	write(t, []byte(n.root), f.Dir, "1.root.json")
	f.Least = before.Version + 1
	publish(t, f, n.now, snapshot.Yanked)
	s, err := n.client(t, f.Dir).Refresh(t.Context())
	if err != nil {
		t.Fatalf("Refresh from the new folder = %v", err)
	}
	if a, _ := s.Find(digest("2")); s.Version != 2 || s.Refreshed != n.now.Unix() || a.State != snapshot.Yanked {
		t.Errorf("Refresh = version %d, timestamp %d, %+v; want 2, %d, yanked", s.Version, s.Refreshed, a, n.now.Unix())
	}

	// The version of the timestamp must grow even if the signer's clock goes back.
	f.Refresh(t, start)
	s, err = n.client(t, f.Dir).Refresh(t.Context())
	if err != nil || s.Refreshed != n.now.Unix()+1 {
		t.Errorf("Refresh after the clock went back = %+v, %v; want timestamp %d", s, err, n.now.Unix()+1)
	}
	// The lowest version that the operator asks for must also apply to the timestamp. The lost folder's last timestamp may
	// have a higher version than the clock gives now, because that signer's clock was ahead.
	f.Least = n.now.Unix() + 100
	publish(t, f, n.now, snapshot.Yanked)
	s, err = n.client(t, f.Dir).Refresh(t.Context())
	if err != nil || s.Version != f.Least || s.Refreshed != f.Least {
		t.Errorf("Refresh = %+v, %v; want list and timestamp %d", s, err, f.Least)
	}
}
