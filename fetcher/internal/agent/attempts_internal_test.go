package agent

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
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

// emptyNode returns an agent and a store of a node without drivers.
func emptyNode(t *testing.T) (*Agent, *install.Store, string) {
	t.Helper()
	dir := t.TempDir()
	root, err := noderoot.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = root.Close() }) // a failed close of a folder loses no data
	store, err := install.Open(root, "/nvidia", true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	a := New(Config{InstallDir: "/nvidia"}, Parts{Node: root, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	return a, store, filepath.Join(dir, "nvidia/.prebake")
}

// TestPreviousStays ends an activation that began without an active driver. The previous driver must stay the previous
// one, if it is still on the disk.
func TestPreviousStays(t *testing.T) {
	t.Parallel()
	for _, there := range []bool{true, false} {
		_, store, own := emptyNode(t)
		want := ""
		before := install.Pointers{Previous: "sets/" + strings.Repeat("a", 64)}
		if there {
			want = before.Previous
			sample.Write(t, own, want+"/set.json", `{"digest":"sha256:`+strings.Repeat("a", 64)+`"}`)
		}
		if _, err := restorePointers(store, before); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Readlink(filepath.Join(own, "previous")); (err == nil) != there {
			t.Errorf("on the disk %t: the link previous: %v", there, err)
		}
		if got, err := store.Pointers(); err != nil || got.Current != "" || got.Previous != want {
			t.Errorf("on the disk %t: Pointers() = %+v, %v; want the previous %q", there, got, err, want)
		}
	}
}

// TestNoRoom checks that the error of makeRoom says that the disk is full, even if the drivers cannot be listed.
func TestNoRoom(t *testing.T) {
	t.Parallel()
	a, store, own := emptyNode(t)
	if err := os.RemoveAll(filepath.Join(own, "sets")); err != nil {
		t.Fatal(err)
	}
	sample.Write(t, own, "sets", "a file")
	full := fmt.Errorf("write: %w", unix.ENOSPC)
	if err := a.makeRoom(t.Context(), store, attempts{}, full); !errors.Is(err, full) || !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("makeRoom = %v; want both causes", err)
	}
}

// TestRetryCommand checks that the command of a hint installs the same driver: with its flavour, or by its digest if
// the owner wants one artifact.
func TestRetryCommand(t *testing.T) {
	t.Parallel()
	set := &install.Set{Digest: "sha256:ab", Driver: target.Driver{Version: "580.95.05", Flavour: target.Proprietary}}
	for pin, want := range map[string]string{
		"":          "fetcher install --retry --driver 580.95.05 --flavour proprietary",
		"sha256:ab": "fetcher install --retry --driver sha256:ab",
	} {
		s := nodeState{facts: &host.Facts{}, pin: pin, attempts: attempts{set.Digest: {Crashes: maxTries}}}
		if hint := fault.Hint(s.refused(set)); !strings.Contains(hint, want) {
			t.Errorf("pin %q: hint %q; want %q", pin, hint, want)
		}
	}
}

// TestRefusedHint checks that the hint for a refused driver names the setting that counts on this node.
func TestRefusedHint(t *testing.T) {
	t.Parallel()
	set := &install.Set{Digest: "sha256:ab", Driver: target.Driver{Version: "580.95.05", Flavour: target.Open}}
	for labelled, want := range map[bool][]string{
		false: {"set --driver", "fetcher install --retry --driver 580.95.05", "--server"},
		true:  {"set the node's label", "fetcher install --retry --driver 580.95.05", "--server"},
	} {
		s := nodeState{facts: &host.Facts{}, labelled: labelled, attempts: attempts{set.Digest: {Crashes: maxTries}}}
		for _, words := range want {
			if hint := fault.Hint(s.refused(set)); !strings.Contains(hint, words) {
				t.Errorf("labelled %t: hint %q; want %q", labelled, hint, words)
			}
		}
	}
}
