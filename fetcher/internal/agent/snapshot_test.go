package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/listed"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/snapshots"
	"github.com/prebake/prebake/pkg/trust"
)

// asks makes the node demand that the snapshot in the folder from lists a driver. The node then reads its former
// snapshot from the disk, as after a restart of the program. As in the program, a dry run writes no snapshot.
func (n *node) asks(t *testing.T, key *testkit.Key, farm *snapshots.Farm, from string, now func() time.Time) {
	t.Helper()
	root, err := os.ReadFile(filepath.Join(farm.Dir, "1.root.json"))
	if err != nil {
		t.Fatal(err)
	}
	client, err := snapshot.New(snapshot.Config{From: from, Root: root,
		State: filepath.Join(n.root, "var/lib/prebake/snapshot.json"), ReadOnly: n.cfg.DryRun, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	rule := &listed.Rule{Client: client}
	v, err := trust.NewVerifier(trust.Policy{Keys: []trust.PublicKey{key.Public(t)}, Listing: rule})
	if err != nil {
		t.Fatal(err)
	}
	n.parts.Verifier, n.parts.Refresh, n.parts.Now = v, rule.Refresh, now
}

// TestSnapshotKeepsOut checks that a node installs a new driver only if the snapshot lists it as published. An attack
// on the snapshot may keep out a new driver, but the active driver must stay.
func TestSnapshotKeepsOut(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	older, newer := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, newVersion)
	po, pn := sample.Publish(t, ref, key, older), sample.Publish(t, ref, key, newer)
	start := time.Now().Truncate(time.Second)
	good := func(p sample.Published) snapshot.Artifact {
		return snapshot.Artifact{Digest: p.Digest, State: snapshot.Published}
	}
	farm := snapshots.New(t, start)
	farm.Publish(t, start, good(po))
	first := farm.Copy(t)
	farm.Publish(t, start, good(po),
		snapshot.Artifact{Digest: pn.Digest, State: snapshot.Yanked, Reason: "panics on unload"})
	yanked := farm.Copy(t)
	farm.Publish(t, start, good(po),
		snapshot.Artifact{Digest: pn.Digest, State: snapshot.Quarantined, Reason: "failed on 3 nodes"})
	quarantined := farm.Copy(t)
	farm.Publish(t, start, good(po))
	seen := farm.Copy(t)
	farm.Publish(t, start, good(po), good(pn))
	stranger := snapshots.New(t, start)
	for range 9 {
		stranger.Publish(t, start, good(pn))
	}
	mixed := farm.Copy(t)
	if err := os.Rename(filepath.Join(mixed, "4.targets.json"), filepath.Join(mixed, "5.targets.json")); err != nil {
		t.Fatal(err)
	}

	for name, row := range map[string]struct {
		// before is the folder of the snapshot with which the node installs the older driver. from is the folder of the
		// snapshot with which the node then asks for the newer driver.
		before, from string
		after        time.Duration
		want         error // nil means that the driver is installed
		excused      bool  // whether the run succeeds nevertheless, because the node has a driver
	}{
		"the newest list has it":    {before: seen, from: farm.Dir},
		"the list does not have it": {before: first, from: seen, want: listed.ErrUnlisted},
		"it is yanked":              {before: first, from: yanked, want: listed.ErrYanked},
		"it is in quarantine":       {before: first, from: quarantined, want: listed.ErrQuarantined},
		"rollback":                  {before: farm.Dir, from: quarantined, want: snapshot.ErrRollback},
		"freeze": {before: farm.Dir, from: farm.Dir, after: 8 * 24 * time.Hour,
			want: snapshot.ErrExpired},
		"mix and match":               {before: seen, from: mixed, want: snapshot.ErrAltered},
		"somebody else's keys":        {before: first, from: stranger.Dir, want: snapshot.ErrSignature},
		"no network, the list has it": {before: farm.Dir, from: "/nowhere"},
		"no network, the list is too old": {before: farm.Dir, from: "/nowhere", after: 8 * 24 * time.Hour,
			want: listed.ErrStale, excused: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			now := start
			clock := func() time.Time { return now }
			n := newNode(t, older, 1, key)
			n.reboot(t)
			n.asks(t, key, farm, row.before, clock)
			if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
				t.Fatalf("install the listed driver = %v", err)
			}
			tree := n.tree(t)
			now = now.Add(row.after)
			n.asks(t, key, farm, row.from, clock)
			r, err := n.run(t, ref, pn.Digest, newer.Driver)
			if row.want == nil {
				if err != nil || r.Answer.Digest != pn.Digest {
					t.Errorf("Run = %+v, %v; want the newer driver", r.Answer, err)
				}
				return
			}
			if row.excused && (err != nil || !strings.Contains(r.Answer.Reason, row.want.Error())) {
				t.Errorf("Run = %v, reason %q; want no error, and the reason %v", err, r.Answer.Reason, row.want)
			} else if !row.excused && (!errors.Is(err, row.want) || fault.Hint(err) == "") {
				t.Errorf("Run = %v (hint %q); want %v", err, fault.Hint(err), row.want)
			}
			if len(n.kernel.calls) > 0 || r.Verdict.State != gpucheck.Ready || r.Answer.Digest != po.Digest {
				t.Errorf("%s, %+v, system calls %v; want the older driver as it was", r.Verdict.State, r.Answer, n.kernel.calls)
			}
			if diff := cmp.Diff(tree, n.tree(t)); diff != "" {
				t.Errorf("tree (-want +got):\n%s", diff)
			}
		})
	}
}

// TestSnapshotTakesNothingAway checks that the node still loads its driver after the snapshot expired, was damaged, or
// listed the driver as quarantined. A yanked driver stays loaded, but the node must not load it after a reboot.
func TestSnapshotTakesNothingAway(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	start := time.Now().Truncate(time.Second)
	now := start
	clock := func() time.Time { return now }
	farm := snapshots.New(t, start)
	farm.Publish(t, start, snapshot.Artifact{Digest: p.Digest, State: snapshot.Published})
	n := newNode(t, c, 1, key)
	n.reboot(t)
	n.asks(t, key, farm, farm.Dir, clock)
	if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
		t.Fatal(err)
	}
	serves := func(when string, calls []string) {
		t.Helper()
		r, err := n.runAs(t)
		if err != nil || r.Verdict.State != gpucheck.Ready {
			t.Errorf("%s: Run = %s, %v; want ready", when, r.Verdict.State, err)
		}
		if diff := cmp.Diff(calls, n.kernel.calls); diff != "" {
			t.Errorf("%s: system calls (-want +got):\n%s", when, diff)
		}
	}
	now = start.AddDate(0, 1, 0)
	n.asks(t, key, farm, "/nowhere", clock)
	serves("expired", nil)
	n.reboot(t)
	serves("expired, after a reboot", loads(newVersion))
	if err := os.WriteFile(filepath.Join(n.root, "var/lib/prebake/snapshot.json"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	n.reboot(t)
	n.asks(t, key, farm, "/nowhere", clock)
	serves("its file damaged, after a reboot", loads(newVersion))
	if err := os.Remove(filepath.Join(n.root, "var/lib/prebake/snapshot.json")); err != nil {
		t.Fatal(err)
	}
	farm.Publish(t, now, snapshot.Artifact{Digest: p.Digest, State: snapshot.Quarantined})
	n.asks(t, key, farm, farm.Dir, clock)
	serves("in quarantine", nil)
	n.reboot(t)
	serves("in quarantine, after a reboot", loads(newVersion))

	farm.Publish(t, now, snapshot.Artifact{Digest: p.Digest, State: snapshot.Yanked, Reason: "panics on unload"})
	n.asks(t, key, farm, farm.Dir, clock)
	r, err := n.runAs(t)
	if !errors.Is(err, listed.ErrYanked) || r.Verdict.State != gpucheck.Ready || len(n.kernel.calls) > 0 {
		t.Errorf("yanked: Run = %s, %v, system calls %v; want an error, and the driver unchanged", r.Verdict.State, err,
			n.kernel.calls)
	}
	n.reboot(t)
	n.asks(t, key, farm, "/nowhere", clock)
	if r, err = n.runAs(t); !errors.Is(err, listed.ErrYanked) || len(n.kernel.calls) > 0 {
		t.Errorf("yanked, after a reboot: Run = %s, %v, system calls %v; want nothing loaded", r.Verdict.State, err,
			n.kernel.calls)
	}
}

// TestSnapshotDryRun checks that a dry run verifies the snapshot but stores nothing. Both the run and Explain must say
// that the snapshot does not list the driver.
func TestSnapshotDryRun(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	start := time.Now().Truncate(time.Second)
	farm := snapshots.New(t, start)
	farm.Publish(t, start)
	n := newNode(t, c, 1, key)
	n.cfg.DryRun = true
	n.asks(t, key, farm, farm.Dir, time.Now)
	if _, err := n.run(t, ref, p.Digest, c.Driver); !errors.Is(err, listed.ErrUnlisted) {
		t.Errorf("dry run = %v; want unlisted", err)
	}
	a := agent.New(n.cfg, n.parts)
	repo, err := n.parts.Open(ref)
	if err != nil {
		t.Fatal(err)
	}
	e, err := a.Explain(t.Context(), repo, p.Digest, c.Kernel, start)
	if !errors.Is(err, listed.ErrUnlisted) || e == nil {
		t.Fatalf("Explain = %+v, %v; want unlisted", e, err)
	}
	last := e.Findings[len(e.Findings)-1]
	if last.Rule != "snapshot" || last.OK {
		t.Errorf("Explain: last rule %+v; want the snapshot's refusal", last)
	}
	for _, dir := range []string{"var", installDir} {
		if _, err := os.Stat(filepath.Join(n.root, dir)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a dry run made the folder %s: %v", dir, err)
		}
	}
}
