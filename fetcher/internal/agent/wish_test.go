package agent_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
)

// branchVersion is a driver of a newer branch than those of oldVersion and newVersion.
const branchVersion = "550.90.07"

// threeDrivers returns a node, and the server's answer for each of three published drivers, by version. The drivers
// with the given versions become active, one after the other; the last one stays active.
func threeDrivers(t *testing.T, active ...string) (*node, map[string]resolve.Answer) {
	t.Helper()
	key, ref, all := testkit.NewKey(t), layout(t), map[string]resolve.Answer{}
	var n *node
	for _, version := range []string{oldVersion, newVersion, branchVersion} {
		c := sample.NewCell(t, buildA, version)
		all[version] = answerOf(resolve.SourceServer, ref, sample.Publish(t, ref, key, c).Digest, c.Driver)
		if n == nil {
			n = newNode(t, c, 1, key)
			n.reboot(t)
		}
	}
	for _, version := range active {
		if _, err := n.run(t, ref, all[version].Digest, all[version].Driver); err != nil {
			t.Fatal(err)
		}
	}
	return n, all
}

// runAs runs the agent once, as a new process, on a node with this label.
func (l nodeLabel) runAs(t *testing.T, n *node) (*agent.Report, error) {
	t.Helper()
	n.kernel.calls = nil
	a := agent.New(n.cfg, n.parts)
	a.UseLabel(l.read)
	return a.Run(t.Context())
}

// TestWaitsForItsWish lets a driver wait for the next boot, then changes the node's label, and boots the node. The boot
// must load the driver only if it waits for the present wish, or is exactly the wanted one. Otherwise it must load the
// active driver, whatever the farm answers, and although the driver that waits would match the wish, too.
func TestWaitsForItsWish(t *testing.T) {
	t.Parallel()
	away := fault.New(fault.Transient, "nobody answers", "")
	for _, row := range []struct {
		name           string
		wish           target.Wish // without a label
		active, waits  string      // versions
		before, then   target.Wish // the label for which the driver waits, and the label after its change
		farm           func(map[string]resolve.Answer) resolve.Finder
		broken         bool // whether no GPU works between the change and the boot
		atBoot         nodeLabel
		former, loaded bool // whether the record is of a former release; whether the boot loads the driver that waits
	}{
		{name: "no farm", active: oldVersion, waits: newVersion, before: newVersion,
			farm: func(map[string]resolve.Answer) resolve.Finder { return resolve.NoSource{} }},
		{name: "a registry alone", wish: "R535", active: newVersion, waits: oldVersion, before: oldVersion,
			farm: func(all map[string]resolve.Answer) resolve.Finder {
				a := all[newVersion]
				a.Source = resolve.SourceRegistry
				return finder{answer: a}
			}},
		{name: "a registry alone, and an unread label at the boot", wish: "R535", active: newVersion, waits: oldVersion,
			before: oldVersion, atBoot: nodeLabel{err: unread},
			farm: func(all map[string]resolve.Answer) resolve.Finder {
				a := all[newVersion]
				a.Source = resolve.SourceRegistry
				return finder{answer: a}
			}},
		{name: "a downgrade", active: newVersion, waits: branchVersion, before: "R550", atBoot: nodeLabel{err: unread},
			farm: func(all map[string]resolve.Answer) resolve.Finder { return finder{answer: all[oldVersion]} }},
		{name: "a broken GPU", active: oldVersion, waits: branchVersion, before: "R550", broken: true,
			atBoot: nodeLabel{err: unread},
			farm:   func(all map[string]resolve.Answer) resolve.Finder { return finder{answer: all[oldVersion]} }},
		{name: "a silent farm", active: oldVersion, waits: branchVersion, before: "R550",
			farm: func(map[string]resolve.Answer) resolve.Finder { return finder{err: away} }},
		{name: "a silent farm, and an unread label at the boot", active: oldVersion, waits: branchVersion, before: "R550",
			atBoot: nodeLabel{err: unread},
			farm:   func(map[string]resolve.Answer) resolve.Finder { return finder{err: away} }},
		{name: "another GPU type", active: oldVersion, waits: branchVersion, before: "latest@NVIDIA_L4",
			then: "latest@NVIDIA_T4", atBoot: nodeLabel{err: unread},
			farm: func(map[string]resolve.Answer) resolve.Finder { return finder{err: away} }},
		{name: "a version that is not published", active: oldVersion, waits: branchVersion, before: "R550",
			then: "555.42.02", atBoot: nodeLabel{err: unread}, farm: func(map[string]resolve.Answer) resolve.Finder {
				return finder{answer: resolve.Answer{State: api.Unknown, Source: resolve.SourceServer}}
			}},
		{name: "no run before the boot", active: oldVersion, waits: branchVersion, before: "R550"},
		{name: "the same label", active: oldVersion, waits: branchVersion, before: "R550", then: "R550",
			atBoot: nodeLabel{wish: "R550"}, loaded: true,
			farm: func(map[string]resolve.Answer) resolve.Finder { return finder{err: away} }},
		{name: "the version of the driver that waits", active: oldVersion, waits: branchVersion, before: "R550",
			then: branchVersion, atBoot: nodeLabel{wish: branchVersion}, loaded: true,
			farm: func(map[string]resolve.Answer) resolve.Finder { return finder{err: away} }},
		{name: "a record of a former release", active: oldVersion, waits: branchVersion, before: "R550", former: true,
			loaded: true, farm: func(map[string]resolve.Answer) resolve.Finder { return finder{err: away} }},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			n, all := threeDrivers(t, row.active)
			if row.wish != "" {
				n.cfg.Wish = row.wish
			}
			n.inUse(t, "1")
			n.parts.Finder = finder{answer: all[row.waits]}
			if _, err := (nodeLabel{wish: row.before}).runAs(t, n); !fault.Is(err, fault.Busy) {
				t.Fatalf("Run with a driver in use = %v; want busy", err)
			}
			if row.former {
				n.forgetWish(t)
			}
			if row.broken {
				n.parts.Probe = probe{n.root, 0}
			}
			if row.farm != nil {
				n.parts.Finder = row.farm(all)
				// The error depends on the farm and the GPU, and the test is about the next boot.
				if r, err := (nodeLabel{wish: row.then}).runAs(t, n); (r.Pending != "") != row.loaded || len(n.kernel.calls) > 0 {
					t.Errorf("Run before the boot = %v, pending %q, system calls %v; want a driver pending: %t", err, r.Pending,
						n.kernel.calls, row.loaded)
				}
			}
			n.reboot(t)
			n.parts.Finder, n.parts.Probe = finder{err: away}, probe{n.root, 1}
			want := row.active
			if row.loaded {
				want = row.waits
			}
			r, err := row.atBoot.runAs(t, n)
			if diff := cmp.Diff(loads(want), n.kernel.calls); diff != "" || r.Verdict.State != gpucheck.Ready ||
				r.Verdict.Digest != all[want].Digest {
				t.Errorf("Run after the boot = %s %s, %v; want %s; system calls (-want +got):\n%s", r.Verdict.State,
					r.Verdict.Driver, err, want, diff)
			}
		})
	}
}

// forgetWish removes the wish from the node's records of activations, which a former release did not store.
func (n *node) forgetWish(t *testing.T) {
	t.Helper()
	file := filepath.Join(n.root, attemptsFile)
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var kept [][]byte
	for line := range bytes.Lines(raw) {
		if !bytes.Contains(line, []byte(`"wish"`)) {
			kept = append(kept, line)
		} else if last := len(kept) - 1; !bytes.HasSuffix(line, []byte(",\n")) { // it was the record's last field
			kept[last] = append(bytes.TrimSuffix(kept[last], []byte(",\n")), '\n')
		}
	}
	if err := os.WriteFile(file, bytes.Join(kept, nil), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestCrashOfADriverOfAFormerWish lets a driver take the node down in its load. While the node is down, its label is
// removed. The node must not load that driver again, although it crashed only once.
func TestCrashOfADriverOfAFormerWish(t *testing.T) {
	t.Parallel()
	n, all := threeDrivers(t, oldVersion)
	n.inUse(t, "1")
	n.parts.Finder = finder{answer: all[branchVersion]}
	label := nodeLabel{wish: "R550"}
	if _, err := label.runAs(t, n); !fault.Is(err, fault.Busy) {
		t.Fatalf("Run with a driver in use = %v; want busy", err)
	}
	n.reboot(t)
	func() {
		n.kernel.die = "nvidia " + branchVersion
		defer func() {
			n.kernel.die = ""
			if recover() == nil {
				t.Fatal("the run ended before the load of the driver that waits")
			}
		}()
		_, _ = label.runAs(t, n)
	}()
	n.reboot(t)
	n.parts.Finder = finder{answer: all[oldVersion]}
	r, err := nodeLabel{}.runAs(t, n)
	if diff := cmp.Diff(loads(oldVersion), n.kernel.calls); diff != "" || err != nil ||
		r.Verdict.Digest != all[oldVersion].Digest {
		t.Errorf("Run = %s, %v; want the former driver; system calls (-want +got):\n%s", r.Verdict.Driver, err, diff)
	}
}

// TestWithdrawnWaits lets a driver wait for the next boot. Then the farm says that a driver is yanked or in quarantine.
// If it is the one that waits, the boot must not load it, although no source answers then.
func TestWithdrawnWaits(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		state  api.State
		driver string // the version that the farm withdraws
		kind   fault.Kind
		loaded bool // whether the boot loads the driver that waits
	}{
		{api.Yanked, newVersion, fault.NoArtifact, false},
		{api.Quarantined, newVersion, fault.Internal, false},
		{api.Quarantined, branchVersion, fault.Internal, true},
	} {
		n, all := threeDrivers(t, oldVersion)
		n.inUse(t, "1")
		n.parts.Finder = finder{answer: all[newVersion]}
		if _, err := n.runAs(t); !fault.Is(err, fault.Busy) {
			t.Fatalf("Run with a driver in use = %v; want busy", err)
		}
		// A server names no digest in this answer.
		n.parts.Finder = finder{answer: resolve.Answer{State: row.state, Source: resolve.SourceServer,
			Driver: all[row.driver].Driver, Reason: "panics"}}
		r, err := n.runAs(t)
		if (err == nil) != (row.kind == fault.Internal) || err != nil && !fault.Is(err, row.kind) ||
			(r.Pending != "") != row.loaded || r.Verdict.Digest != all[oldVersion].Digest {
			t.Errorf("%s %s: Run = %s, %v, pending %q; want the active driver, %v, and a driver pending: %t", row.driver,
				row.state, r.Verdict.Driver, err, r.Pending, row.kind, row.loaded)
		}
		n.reboot(t)
		n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
		want := oldVersion
		if row.loaded {
			want = newVersion
		}
		r, err = n.runAs(t)
		if diff := cmp.Diff(loads(want), n.kernel.calls); diff != "" || r.Verdict.Digest != all[want].Digest {
			t.Errorf("%s %s: Run after the boot = %s, %v; system calls (-want +got):\n%s", row.driver, row.state,
				r.Verdict.Driver, err, diff)
		}
	}
}

// TestWithdrawnDuringWaitIdle changes what the farm says while a run waits for an idle GPU. The run must not load a
// driver that was withdrawn meanwhile. It must load the driver that the farm names then; or the first one, if the farm
// does not answer or only a registry does.
func TestWithdrawnDuringWaitIdle(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name string
		then func(all map[string]resolve.Answer) finder
		kind fault.Kind // Internal means no error
		want string
	}{
		{"yanked", func(all map[string]resolve.Answer) finder {
			return finder{answer: resolve.Answer{State: api.Yanked, Source: resolve.SourceServer,
				Driver: all[newVersion].Driver}}
		}, fault.NoArtifact, oldVersion},
		{"in quarantine", func(all map[string]resolve.Answer) finder {
			return finder{answer: resolve.Answer{State: api.Quarantined, Source: resolve.SourceServer,
				Driver: all[newVersion].Driver}}
		}, fault.Internal, oldVersion},
		{"another driver", func(all map[string]resolve.Answer) finder { return finder{answer: all[branchVersion]} },
			fault.Internal, branchVersion},
		{"a registry's driver", func(all map[string]resolve.Answer) finder {
			a := all[oldVersion]
			a.Source = resolve.SourceRegistry
			return finder{answer: a}
		}, fault.Internal, newVersion},
		{"no response", func(map[string]resolve.Answer) finder {
			return finder{err: fault.New(fault.Transient, "nobody answers", "")}
		}, fault.Internal, newVersion},
		{"unknown", func(map[string]resolve.Answer) finder {
			return finder{answer: resolve.Answer{State: api.Unknown, Source: resolve.SourceServer}}
		}, fault.Internal, newVersion},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				n, all := threeDrivers(t, oldVersion)
				n.inUse(t, "1")
				n.cfg.WaitIdle = time.Minute
				farm := &finder{answer: all[newVersion]}
				n.parts.Finder = farm
				a := agent.New(n.cfg, n.parts)
				a.Watch(&ending{&told{}, func() { *farm = row.then(all); n.inUse(t, "0") }})
				r, err := a.Run(t.Context())
				if (err == nil) != (row.kind == fault.Internal) || err != nil && !fault.Is(err, row.kind) ||
					r.Verdict.Digest != all[row.want].Digest || r.Pending != "" {
					t.Errorf("Run = %s, %v, pending %q; want %s, %v", r.Verdict.Driver, err, r.Pending, row.want, row.kind)
				}
			})
		})
	}
}

// TestPreviousIsTheVersion boots a node without a farm. If its label is exactly the previous driver's version, the node
// must load the previous driver. If the label is unread or matches the active driver, too, the active driver must stay.
func TestPreviousIsTheVersion(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		label nodeLabel
		want  string
	}{
		{nodeLabel{wish: oldVersion}, oldVersion},
		{nodeLabel{wish: newVersion}, newVersion},
		{nodeLabel{wish: "R535"}, newVersion},
		{nodeLabel{err: unread}, newVersion},
	} {
		n, all := threeDrivers(t, oldVersion, newVersion)
		n.reboot(t)
		n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
		r, err := row.label.runAs(t, n)
		if diff := cmp.Diff(loads(row.want), n.kernel.calls); diff != "" || fault.Of(err) != fault.Of(row.label.err) ||
			r.Verdict.Digest != all[row.want].Digest {
			t.Errorf("label %+v: Run = %s, %v; want %s; system calls (-want +got):\n%s", row.label, r.Verdict.Driver, err,
				row.want, diff)
		}
	}
}

// TestRolledBackFromTheVersion rolls back the driver whose version is wanted. While no source answers, each run must
// say so, because another driver than the wanted one is active: not only the runs after the rollback.
func TestRolledBackFromTheVersion(t *testing.T) {
	t.Parallel()
	n, _, _, po, _ := noted(t)
	n.cfg.Wish = target.Wish(newVersion)
	n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
	n.inUse(t, "0")
	for i := range 2 {
		if r, err := n.runAs(t); !fault.Is(err, fault.Transient) || r.Verdict.Digest != po.Digest ||
			r.Verdict.State != gpucheck.Ready {
			t.Errorf("run %d = %s %s, %v; want the previous driver, and the error of the source", i, r.Verdict.State,
				r.Verdict.Digest, err)
		}
	}
}
