package listed_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/fetcher/internal/listed"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/testkit/snapshots"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func digest(c string) string { return "sha256:" + strings.Repeat(c, 64) }

// TestCheck checks four artifacts, once as new ones and once as installed ones. The snapshot lists 1 as published, 2 as
// yanked and 3 as quarantined. It does not list 4.
func TestCheck(t *testing.T) {
	t.Parallel()
	farm := snapshots.New(t, start)
	farm.Publish(t, start,
		snapshot.Artifact{Digest: digest("1"), State: snapshot.Published},
		snapshot.Artifact{Digest: digest("2"), State: snapshot.Yanked, Reason: "panics on unload", Replacement: digest("1")},
		snapshot.Artifact{Digest: digest("3"), State: snapshot.Quarantined, Reason: "failed on 3 nodes"})
	root, err := os.ReadFile(filepath.Join(farm.Dir, "1.root.json"))
	if err != nil {
		t.Fatal(err)
	}
	tampered := farm.Copy(t)
	if err := os.WriteFile(filepath.Join(tampered, "timestamp.json"), root, 0o644); err != nil {
		t.Fatal(err)
	}
	const day = 24 * time.Hour
	all := func(err error) [4]error { return [4]error{err, listed.ErrYanked, listed.ErrQuarantined, err} }
	for name, row := range map[string]struct {
		rule *listed.Rule // nil is the strictest rule
		// seen means that the node has fetched the snapshot before. from is the source that the node asks then.
		seen  bool
		from  string
		after time.Duration
		fresh [4]error // the wanted errors for the four artifacts if they are new
		kind  fault.Kind
	}{
		"the newest list": {from: farm.Dir,
			fresh: [4]error{nil, listed.ErrYanked, listed.ErrQuarantined, listed.ErrUnlisted}},
		"an unlisted one may be taken": {rule: &listed.Rule{AllowUnlisted: true}, from: farm.Dir,
			fresh: [4]error{nil, listed.ErrYanked, listed.ErrQuarantined, nil}},
		"no network, and the list holds": {seen: true, from: "/nowhere", after: 6 * day,
			fresh: [4]error{nil, listed.ErrYanked, listed.ErrQuarantined, listed.ErrUnlisted}},
		"no network, and it has expired": {seen: true, from: "/nowhere", after: 8 * day,
			fresh: all(listed.ErrStale), kind: fault.Transient},
		"the source shows it for ever": {seen: true, from: farm.Dir, after: 8 * day,
			fresh: all(snapshot.ErrExpired)},
		"it is older than the policy wants": {rule: &listed.Rule{MaxAge: day}, from: farm.Dir,
			after: 2 * day, fresh: all(listed.ErrStale)},
		"the clock is wrong": {from: farm.Dir, after: -400 * day,
			fresh: all(listed.ErrStale)},
		"the source is not what it was": {seen: true, from: tampered,
			fresh: all(snapshot.ErrMalformed)},
		"no list at all": {from: "/nowhere",
			fresh: [4]error{listed.ErrNone, listed.ErrNone, listed.ErrNone, listed.ErrNone}, kind: fault.Transient},
		"no list, which is optional": {rule: &listed.Rule{Optional: true}, from: "/nowhere"},
		"an expired one, which is optional": {rule: &listed.Rule{Optional: true}, seen: true,
			from: farm.Dir, after: 8 * day, fresh: all(nil)},
		"an optional one, of a source that is not what it was": {rule: &listed.Rule{Optional: true}, seen: true,
			from: tampered, fresh: all(snapshot.ErrMalformed)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			now := start.Add(time.Hour)
			client := func(from string) *snapshot.Client {
				c, err := snapshot.New(snapshot.Config{From: from, Root: root, State: filepath.Join(t.TempDir(), "snapshot.json"),
					Now: func() time.Time { return now }})
				if err != nil {
					t.Fatal(err)
				}
				return c
			}
			rule := row.rule
			if rule == nil {
				rule = &listed.Rule{}
			}
			if row.seen {
				rule.Client = client(farm.Dir)
				if err := rule.Refresh(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			now = now.Add(row.after)
			rule.Client = client(row.from)
			_ = rule.Refresh(t.Context()) // the calls of Check below report the error
			kind := row.kind
			if kind == fault.Internal {
				kind = fault.Unverified
			}
			for i, want := range row.fresh {
				d := digest(string(rune('1' + i)))
				switch detail, err := rule.Check(d, now); {
				case want == nil && (err != nil || detail == ""):
					t.Errorf("Check(%s) of a new artifact = %q, %v; want no error", d[:8], detail, err)
				case want != nil && (!errors.Is(err, want) || fault.Hint(err) == ""):
					t.Errorf("Check(%s) of a new artifact = %v (hint %q); want %v", d[:8], err, fault.Hint(err), want)
				case want != nil && i == 0 && fault.Of(err) != kind:
					t.Errorf("Check(%s) of a new artifact = %v, %v; want kind %v", d[:8], err, fault.Of(err), kind)
				}
				_, err := rule.Check(d, time.Time{})
				yanked := i == 1 && (row.seen || row.fresh[1] != nil && !errors.Is(row.fresh[1], listed.ErrNone))
				if yanked != errors.Is(err, listed.ErrYanked) || !yanked && err != nil {
					t.Errorf("Check(%s) of an artifact on the node = %v; want ErrYanked: %v, and no other error", d[:8], err, yanked)
				}
			}
		})
	}
}

// TestAnotherRoot checks a node whose operator replaced the trusted root of the snapshot. An artifact that was yanked
// under the former root must stay yanked. An artifact that was published there must no longer be accepted.
func TestAnotherRoot(t *testing.T) {
	t.Parallel()
	farm, next := snapshots.New(t, start), snapshots.New(t, start)
	farm.Publish(t, start,
		snapshot.Artifact{Digest: digest("1"), State: snapshot.Published},
		snapshot.Artifact{Digest: digest("2"), State: snapshot.Yanked})
	state := filepath.Join(t.TempDir(), "snapshot.json")
	client := func(rootOf, from string) *snapshot.Client {
		root, err := os.ReadFile(filepath.Join(rootOf, "1.root.json"))
		if err != nil {
			t.Fatal(err)
		}
		c, err := snapshot.New(snapshot.Config{From: from, Root: root, State: state, Now: func() time.Time { return start }})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if _, err := client(farm.Dir, farm.Dir).Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, optional := range []bool{false, true} {
		rule := &listed.Rule{Client: client(next.Dir, "/nowhere"), AllowUnlisted: true, Optional: optional}
		if err := rule.Refresh(t.Context()); !fault.Is(err, fault.Transient) {
			t.Errorf("Refresh from nowhere = %v; want transient", err)
		}
		for _, now := range []time.Time{{}, start} {
			if _, err := rule.Check(digest("2"), now); !errors.Is(err, listed.ErrYanked) {
				t.Errorf("Check(2, %v) = %v; want yanked, optional: %v", now, err, optional)
			}
		}
		want := listed.ErrNone
		if optional {
			want = nil
		}
		if _, err := rule.Check(digest("1"), start); !errors.Is(err, want) {
			t.Errorf("Check(1) of something new = %v; want %v, optional: %v", err, want, optional)
		}
	}
}

// TestWords checks that the error about a yanked artifact has the reason, and that its hint names the replacement.
func TestWords(t *testing.T) {
	t.Parallel()
	farm := snapshots.New(t, start)
	farm.Publish(t, start, snapshot.Artifact{Digest: digest("2"), State: snapshot.Yanked, Reason: "panics on unload",
		Replacement: digest("1")})
	root, err := os.ReadFile(filepath.Join(farm.Dir, "1.root.json"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := snapshot.New(snapshot.Config{From: farm.Dir, Root: root, Now: func() time.Time { return start }})
	if err != nil {
		t.Fatal(err)
	}
	rule := &listed.Rule{Client: c}
	if err := rule.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err = rule.Check(digest("2"), start)
	if err == nil || !strings.Contains(err.Error(), "panics on unload") ||
		!strings.Contains(fault.Hint(err), digest("1")) {
		t.Errorf("Check = %v (hint %q); want the reason and the replacement", err, fault.Hint(err))
	}
}
