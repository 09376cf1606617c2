package snapshot_test

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/snapshot/maker"
	"github.com/prebake/prebake/pkg/testkit/snapshots"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var (
	start  = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	digest = func(c string) string { return "sha256:" + strings.Repeat(c, 64) }
)

// publish publishes a list. In it, artifact 1 is published, and artifact 2 has the given state.
func publish(t testing.TB, f *snapshots.Farm, at time.Time, second snapshot.State) {
	t.Helper()
	f.Publish(t, at, snapshot.Artifact{Digest: digest("2"), State: second, Reason: "panics on unload"},
		snapshot.Artifact{Digest: digest("1"), State: snapshot.Published})
}

func read(t testing.TB, parts ...string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(parts...))
	check(t, err)
	return data
}

func write(t testing.TB, data []byte, parts ...string) {
	t.Helper()
	check(t, os.WriteFile(filepath.Join(parts...), data, 0o644))
}

// node is a client with its own state file and its own clock.
type node struct {
	state, root string
	now         time.Time
}

func newNode(t testing.TB, f *snapshots.Farm) *node {
	t.Helper()
	return &node{state: filepath.Join(t.TempDir(), "state", "snapshot.json"), root: string(read(t, f.Dir, "1.root.json")),
		now: start.Add(time.Hour)}
}

func (n *node) client(t testing.TB, from string) *snapshot.Client {
	t.Helper()
	c, err := snapshot.New(snapshot.Config{From: from, Root: []byte(n.root), State: n.state,
		Now: func() time.Time { return n.now }})
	check(t, err)
	return c
}

// checkList checks that a node that starts again still knows list 1, in which artifact 2 is yanked. If former is true,
// the node must know only the withdrawn artifacts of that list.
func (n *node) checkList(t testing.TB, from string, former bool) {
	t.Helper()
	last, err := n.client(t, from).Last()
	if err != nil || last == nil {
		t.Errorf("Last = %v, %v; want list 1", last, err)
		return
	}
	yanked, _ := last.Find(digest("2"))
	_, all := last.Find(digest("1"))
	if last.Version != 1 || last.Former != former || yanked.State != snapshot.Yanked || all == former {
		t.Errorf("Last = %+v; want list 1 with artifact 2 yanked, former: %v", last, former)
	}
}

// serve runs a web server for a folder until the test ends, and returns its URL.
func serve(t testing.TB, dir string) string {
	t.Helper()
	server := httptest.NewServer(http.FileServer(http.Dir(dir)))
	t.Cleanup(server.Close)
	return server.URL
}

// TestRefresh reads a list from a folder and from a web server. Afterwards the node must know the list without the
// source.
func TestRefresh(t *testing.T) {
	t.Parallel()
	f := snapshots.New(t, start)
	publish(t, f, start, snapshot.Yanked)
	for name, from := range map[string]string{"folder": f.Dir, "web server": serve(t, f.Dir)} {
		n := newNode(t, f)
		s, err := n.client(t, from).Refresh(t.Context())
		if err != nil {
			t.Errorf("Refresh from a %s = %v", name, err)
			continue
		}
		if a, ok := s.Find(digest("2")); !ok || a.State != snapshot.Yanked || a.Reason != "panics on unload" {
			t.Errorf("Find(2) = %+v, %v; want yanked", a, ok)
		}
		if _, ok := s.Find(digest("3")); ok {
			t.Error("Find(3) = true; it is not in the list")
		}
		if want := start.AddDate(0, 0, 7); !s.Expires.Equal(want) || s.Version != 1 {
			t.Errorf("version %d expires %v; want 1, %v", s.Version, s.Expires, want)
		}
		last, err := n.client(t, "/nowhere").Last()
		if err != nil || last == nil || last.Version != 1 {
			t.Errorf("Last = %+v, %v; want version 1", last, err)
		}
		if left, err := filepath.Glob(n.state + ".*"); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}
}

// TestGoesOn checks that a node accepts newer lists, newer roots, and the refreshed timestamp of a list.
func TestGoesOn(t *testing.T) {
	t.Parallel()
	f := snapshots.New(t, start)
	publish(t, f, start, snapshot.Published)
	n := newNode(t, f)
	refresh := func(want snapshot.State, version int64, at time.Time, more int64) {
		t.Helper()
		refreshed := at.Unix() + more
		s, err := n.client(t, f.Dir).Refresh(t.Context())
		if err != nil {
			t.Errorf("Refresh = %v", err)
			return
		}
		if a, _ := s.Find(digest("2")); a.State != want || s.Version != version || s.Refreshed != refreshed {
			t.Errorf("state %s, version %d, refreshed %d; want %s, %d, %d", a.State, s.Version, s.Refreshed, want, version,
				refreshed)
		}
	}
	refresh(snapshot.Published, 1, start, 0)
	refresh(snapshot.Published, 1, start, 0)
	publish(t, f, start.AddDate(0, 0, 1), snapshot.Quarantined)
	refresh(snapshot.Quarantined, 2, start.AddDate(0, 0, 1), 0)

	n.now = start.AddDate(0, 0, 20)
	if _, err := n.client(t, f.Dir).Refresh(t.Context()); !errors.Is(err, snapshot.ErrExpired) {
		t.Errorf("Refresh after three weeks = %v; want expired", err)
	}
	f.Refresh(t, n.now)
	refresh(snapshot.Quarantined, 2, n.now, 0)

	f.Stamps = snapshots.NewSigner(t) // a new key replaces the old one, as after a leak
	f.WriteRoot(t, start, f.Root[0], f.Root[1])
	publish(t, f, n.now, snapshot.Yanked)
	refresh(snapshot.Yanked, 3, n.now, 1)
	if n.root != string(read(t, f.Dir, "1.root.json")) {
		t.Error("the node's own root changed")
	}
	for range 6 {
		publish(t, f, n.now, snapshot.Yanked)
	}
	if lists, err := filepath.Glob(filepath.Join(f.Dir, "*.targets.json")); err != nil || len(lists) != 4 {
		t.Errorf("kept lists: %v, %v; want the newest and three before", lists, err)
	}
	refresh(snapshot.Yanked, 9, n.now, 7)
}

// TestEndlessData has a server whose answer does not end. The client must stop at the size limit of the file.
func TestEndlessData(t *testing.T) {
	t.Parallel()
	f := snapshots.New(t, start)
	publish(t, f, start, snapshot.Yanked)
	file := http.FileServer(http.Dir(f.Dir))
	for _, name := range []string{"/2.root.json", "/timestamp.json", "/1.snapshot.json", "/1.targets.json",
		strings.TrimPrefix(list(t, f.Dir, 1), f.Dir)} {
		var sent int
		done := make(chan struct{})
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != name {
				file.ServeHTTP(w, r)
				return
			}
			defer close(done)
			piece := []byte(strings.Repeat(" ", 1<<16))
			for {
				n, err := w.Write(piece)
				if sent += n; err != nil {
					return
				}
			}
		}))
		n := newNode(t, f)
		if _, err := n.client(t, server.URL).Refresh(t.Context()); !errors.Is(err, snapshot.ErrEndless) ||
			!fault.Is(err, fault.Unverified) {
			t.Errorf("Refresh with an endless %s = %v; want endless data", name, err)
		}
		<-done
		server.Close()
		if most := 64 << 20; sent > most { // more than the limit, because the kernel also buffers data
			t.Errorf("the server sent %d bytes of %s; want at most %d", sent, name, most)
		}
	}
}

// TestAway checks that a source that cannot be reached causes an error of the kind Transient, and does not count as an
// attack.
func TestAway(t *testing.T) {
	t.Parallel()
	f := snapshots.New(t, start)
	publish(t, f, start, snapshot.Yanked)
	busy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	t.Cleanup(busy.Close)
	closed := httptest.NewServer(nil)
	closed.Close()
	broken := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "1000")
		_, _ = io.WriteString(w, "{")
	}))
	t.Cleanup(broken.Close)
	half := f.Copy(t)
	check(t, os.Remove(list(t, half, 1)))
	for name, from := range map[string]string{"no folder": "/nowhere", "an empty folder": t.TempDir(),
		"a server that is busy": busy.URL, "no server": closed.URL,
		"half an answer": broken.URL, "a list that is not there yet": half} {
		n := newNode(t, f)
		if _, err := n.client(t, from).Refresh(t.Context()); !fault.Is(err, fault.Transient) || fault.Hint(err) == "" {
			t.Errorf("Refresh from %s = %v (%v, hint %q); want transient", name, err, fault.Of(err), fault.Hint(err))
		}
	}
}

// TestRootStays checks that a node keeps a new root even if it refuses the other files of the source.
func TestRootStays(t *testing.T) {
	t.Parallel()
	f := snapshots.New(t, start)
	publish(t, f, start, snapshot.Yanked)
	n := newNode(t, f)
	_, err := n.client(t, f.Dir).Refresh(t.Context())
	check(t, err)
	old := f.Copy(t)
	leaked := f.Stamps
	f.Stamps = snapshots.NewSigner(t)
	f.WriteRoot(t, start, f.Root[1], f.Root[2])
	// The source has the new root, but the old key signed its timestamp.
	if _, err := n.client(t, f.Dir).Refresh(t.Context()); !errors.Is(err, snapshot.ErrSignature) {
		t.Errorf("Refresh = %v; want the signature refused", err)
	}
	n.checkList(t, f.Dir, false)
	// An attacker with the old timestamp key serves the old folder, which lacks the new root.
	stamp := metadata.Timestamp(start.AddDate(0, 1, 0))
	former, err := metadata.Timestamp().FromBytes(read(t, old, "timestamp.json"))
	check(t, err)
	stamp.Signed.Version, stamp.Signed.Meta = futureVersion, former.Signed.Meta
	sign(t, stamp, leaked, old, "timestamp.json")
	if _, err := n.client(t, old).Refresh(t.Context()); !errors.Is(err, snapshot.ErrSignature) {
		t.Errorf("Refresh by the leaked key = %v; want the signature refused", err)
	}
	n.checkList(t, old, false)
}

// TestState checks that a node verifies its own state file.
func TestState(t *testing.T) {
	t.Parallel()
	f := snapshots.New(t, start)
	publish(t, f, start, snapshot.Yanked)
	n := newNode(t, f)
	if last, err := n.client(t, f.Dir).Last(); last != nil || err != nil {
		t.Errorf("Last of a new node = %v, %v; want nothing", last, err)
	}
	_, err := n.client(t, f.Dir).Refresh(t.Context())
	check(t, err)
	whole := read(t, n.state)
	for name, data := range map[string][]byte{"half": whole[:len(whole)/2], "no JSON": []byte("x"),
		"a part of somebody else": swapped(t, whole)} {
		write(t, data, n.state)
		if _, err := n.client(t, f.Dir).Last(); !fault.Is(err, fault.Unverified) || fault.Hint(err) == "" {
			t.Errorf("Last of a state that is %s = %v; want unverified", name, err)
		}
	}
	// With another configured root, the node must start anew, but it must still know the withdrawn artifacts.
	write(t, whole, n.state)
	other := snapshots.New(t, start)
	publish(t, other, start, snapshot.Published)
	first := n.root
	n.root = string(read(t, other.Dir, "1.root.json"))
	n.checkList(t, other.Dir, true)
	for _, from := range []string{"/nowhere", f.Dir} {
		if _, err := n.client(t, from).Refresh(t.Context()); err == nil {
			t.Errorf("Refresh from %s under another root = nil; want an error", from)
		}
		n.checkList(t, from, true)
	}
	// The owner configures the first root again. The node must know its whole list again.
	second := n.root
	n.root = first
	n.checkList(t, "/nowhere", false)
	n.root = second
	if s, err := n.client(t, other.Dir).Refresh(t.Context()); err != nil || s.Version != 1 {
		t.Errorf("Refresh under another root = %v, %v", s, err)
	}
	if last, err := n.client(t, other.Dir).Last(); err != nil || last.Former || len(last.Artifacts) != 2 {
		t.Errorf("Last after that = %+v, %v; want the whole list", last, err)
	}
}

func swapped(t testing.TB, state []byte) []byte {
	t.Helper()
	var m map[string]any
	check(t, json.Unmarshal(state, &m))
	m["targets"] = m["snapshot"]
	out, err := json.Marshal(m)
	check(t, err)
	return out
}

func TestUsage(t *testing.T) {
	t.Parallel()
	root := read(t, snapshots.New(t, start).Dir, "1.root.json")
	for name, cfg := range map[string]snapshot.Config{
		"no root": {From: "/x"}, "a root of nobody": {From: "/x", Root: []byte("{}")}, "no source": {Root: root},
		"a relative path":  {From: "x", Root: root},
		"another protocol": {From: "ftp://x/y", Root: root}, "a query": {From: "https://x/?a=b", Root: root},
		"a root that somebody changed": {From: "/x", Root: editSigned(t, root, func(s map[string]any) { s["version"] = 2 })},
	} {
		if _, err := snapshot.New(cfg); !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
			t.Errorf("New with %s = %v; want usage and a hint", name, err)
		}
	}
}

// TestDecode checks that Decode refuses malformed lists, and a list with more than [snapshot.MaxText] bytes of text.
func TestDecode(t *testing.T) {
	t.Parallel()
	good, err := maker.Encode(snapshot.Catalogue{Schema: snapshot.Schema, MadeAt: start,
		Artifacts: []snapshot.Artifact{{Digest: digest("1"), State: snapshot.Published}}})
	check(t, err)
	if c, err := snapshot.Decode(good); err != nil || len(c.Artifacts) != 1 || !c.MadeAt.Equal(start) {
		t.Errorf("Decode = %+v, %v", c, err)
	}
	for name, text := range map[string]string{
		"another schema": `{"schema":2,"madeAt":"2026-01-01T00:00:00Z"}`, "no time": `{"schema":1}`,
		"an unknown state": `{"schema":1,"madeAt":"2026-01-01T00:00:00Z","artifacts":[{"digest":"` + digest("1") +
			`","state":"odd"}]}`,
		"no digest": `{"schema":1,"madeAt":"2026-01-01T00:00:00Z","artifacts":[{"digest":"latest","state":"published"}]}`,
		"two":       `{"schema":1,"madeAt":"2026-01-01T00:00:00Z"} {}`,
		"twice": `{"schema":1,"madeAt":"2026-01-01T00:00:00Z","artifacts":[{"digest":"` + digest("1") +
			`","state":"yanked"},{"digest":"` + digest("1") + `","state":"published"}]}`,
		"much": strings.Repeat("\x00", 257<<20),
	} {
		if c, err := snapshot.Decode(packed(t, text)); !errors.Is(err, snapshot.ErrMalformed) {
			t.Errorf("Decode(%s) = %v, %v; want malformed", name, c, err)
		}
	}
	if _, err := snapshot.Decode([]byte("plain")); !errors.Is(err, snapshot.ErrMalformed) {
		t.Errorf("Decode of what is not packed = %v; want malformed", err)
	}
}
