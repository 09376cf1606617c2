package agent_test

import (
	"context"
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

// byWish is a farm that has one artifact for each wish. For the wishes in silent, nobody answers. It records the
// questions.
type byWish struct {
	has    map[target.Wish]resolve.Answer
	silent map[target.Wish]bool
	asked  []resolve.Question
}

func (f *byWish) Find(_ context.Context, q resolve.Question) (resolve.Answer, error) {
	f.asked = append(f.asked, q)
	if f.silent[q.Wish] {
		return resolve.Answer{}, fault.New(fault.Transient, "nobody answers", "")
	}
	if a, ok := f.has[q.Wish]; ok {
		return a, nil
	}
	return resolve.Answer{State: api.Unknown}, nil
}

// nodeLabel is the label of a node: its wish, or the error of its read.
type nodeLabel struct {
	wish target.Wish
	err  error
}

func (l *nodeLabel) read(context.Context) (target.Wish, error) { return l.wish, l.err }

var (
	malformed = fault.New(fault.Usage, "the label is malformed", "correct it")
	unread    = fault.New(fault.Transient, "the API server does not answer", "")
)

// TestLabel changes a node's label. The node must get the driver that the label asks for. If the label is malformed,
// the active driver must stay, and the farm must not be asked. If the label cannot be read, the last value must hold,
// also a malformed one. If the farm does not say which driver the label means, the report must say so and why, so that
// another run follows.
func TestLabel(t *testing.T) {
	t.Parallel()
	n, ref, older, newer, po, pn := publishTwo(t, 1)
	farm := &byWish{has: map[target.Wish]resolve.Answer{
		"default":           answerOf("server", ref, po.Digest, older.Driver),
		"default@NVIDIA_L4": answerOf("server", ref, pn.Digest, newer.Driver),
		"535.100.01":        answerOf("server", ref, po.Digest, older.Driver),
		"default@NVIDIA_B200": {State: api.Unknown, Source: "server",
			Driver: target.Driver{Version: "580.95.05", Flavour: target.Open}},
		"latest@NVIDIA_L4":    {State: api.Failed, Source: "server", Driver: newer.Driver},
		"default@NVIDIA_H100": {State: api.Unknown, Source: "server"},
		"R535": {State: api.Failed, Source: "server",
			Driver: target.Driver{Version: "535.999.01", Flavour: target.Open}},
	}, silent: map[target.Wish]bool{"latest@NVIDIA_T4": true}}
	n.parts.Finder = farm
	label := &nodeLabel{}
	a := agent.New(n.cfg, n.parts)
	a.UseLabel(label.read)
	for _, row := range []struct {
		name   string
		label  nodeLabel
		asked  target.Wish // "" means that the farm is not asked
		active string
		kind   fault.Kind // Internal means no error
		open   bool       // whether the farm must be asked again
	}{
		{"no label", nodeLabel{}, "default", po.Digest, fault.Internal, false},
		{"a silent farm", nodeLabel{wish: "latest@NVIDIA_T4"}, "latest@NVIDIA_T4", po.Digest, fault.Internal, true},
		{"a farm that does not know the kernel", nodeLabel{wish: "latest"}, "latest", po.Digest, fault.Internal, true},
		{"a newer driver that does not compile", nodeLabel{wish: "R535"}, "R535", po.Digest, fault.Internal, true},
		{"a GPU type without a list", nodeLabel{wish: "default@NVIDIA_H100"}, "default@NVIDIA_H100", po.Digest,
			fault.NoArtifact, false},
		{"a label", nodeLabel{wish: "default@NVIDIA_L4"}, "default@NVIDIA_L4", pn.Digest, fault.Internal, false},
		{"an unread label", nodeLabel{err: unread}, "default@NVIDIA_L4", pn.Digest, fault.Internal, false},
		{"a malformed label", nodeLabel{err: malformed}, "", pn.Digest, fault.Usage, false},
		{"an unread label, which was malformed", nodeLabel{err: unread}, "", pn.Digest, fault.Usage, false},
		{"a GPU type whose driver is not published", nodeLabel{wish: "default@NVIDIA_B200"}, "default@NVIDIA_B200", pn.Digest,
			fault.NoArtifact, false},
		{"a GPU type whose driver is installed", nodeLabel{wish: "latest@NVIDIA_L4"}, "latest@NVIDIA_L4", pn.Digest,
			fault.Internal, false},
		{"a removed label, which would be a downgrade", nodeLabel{}, "default", pn.Digest, fault.Mismatch, false},
		{"a label with an older version", nodeLabel{wish: "535.100.01"}, "535.100.01", po.Digest, fault.Internal, false},
	} {
		farm.asked, *label = nil, row.label
		r, err := a.Run(t.Context())
		var asked target.Wish
		if len(farm.asked) > 0 {
			asked = farm.asked[0].Wish
		}
		if asked != row.asked || r.Verdict.Digest != row.active || r.Verdict.State != gpucheck.Ready ||
			(err == nil) != (row.kind == fault.Internal) || err != nil && !fault.Is(err, row.kind) ||
			r.Unconfirmed != row.open || row.open && r.Answer.Reason == "" {
			t.Errorf("%s: the farm is asked for %q, driver %s is %s, unconfirmed %t (%s), %v; want %q, %s, %t, %v", row.name,
				asked, r.Verdict.Digest, r.Verdict.State, r.Unconfirmed, r.Answer.Reason, err, row.asked, row.active, row.open,
				row.kind)
		}
	}
}

// TestLabelAndDigest checks that a label overrides a digest in --driver.
func TestLabelAndDigest(t *testing.T) {
	t.Parallel()
	n, _, _, _, po, _ := publishTwo(t, 1)
	farm := &byWish{}
	n.cfg.Pin, n.parts.Finder = po.Digest, farm
	label := &nodeLabel{}
	a := agent.New(n.cfg, n.parts)
	a.UseLabel(label.read)
	for wish, want := range map[target.Wish]string{"": po.Digest, "R580": ""} {
		farm.asked, label.wish = nil, wish
		_, _ = a.Run(t.Context()) // the farm has nothing; only the question counts
		if len(farm.asked) != 1 || farm.asked[0].Pin != want {
			t.Errorf("label %q: the farm is asked %+v; want the digest %q", wish, farm.asked, want)
		}
	}
}

// TestLabelAtBoot checks which driver a booting node loads while another one waits for the boot: the active one if the
// label is malformed, and the one that waits if the label cannot be read. If the label was removed before the boot, and
// a run has found the active driver to be the wanted one, no driver waits any more. A node without a driver gets none.
func TestLabelAtBoot(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name    string
		removed bool  // whether the label is removed before the boot
		err     error // of the read at the boot
		waiting bool  // whether the driver that waits is loaded
	}{
		{"a malformed label", false, malformed, false},
		{"an unread label", false, unread, true},
		{"a removed label", true, nil, false},
		{"a removed label, which is unread at the boot", true, unread, false},
	} {
		n, ref, older, newer, po, pn := publishTwo(t, 1)
		n.inUse(t, "1")
		n.parts.Finder = &byWish{has: map[target.Wish]resolve.Answer{
			"default":           answerOf("server", ref, po.Digest, older.Driver),
			"default@NVIDIA_L4": answerOf("server", ref, pn.Digest, newer.Driver)}}
		a, label := agent.New(n.cfg, n.parts), &nodeLabel{wish: "default@NVIDIA_L4"}
		a.UseLabel(label.read)
		if _, err := a.Run(t.Context()); !fault.Is(err, fault.Busy) {
			t.Fatalf("Run with a driver in use = %v; want busy", err)
		}
		if label.wish = ""; row.removed {
			if r, err := a.Run(t.Context()); err != nil || r.Verdict.Digest != po.Digest || r.Pending != "" {
				t.Errorf("%s: Run before the boot = %s, %v, pending %q; want %s", row.name, r.Verdict.Digest, err, r.Pending,
					po.Digest)
			}
		}
		n.reboot(t)
		n.kernel.calls = nil
		b := agent.New(n.cfg, n.parts)
		b.UseLabel((&nodeLabel{err: row.err}).read)
		r, err := b.Run(t.Context())
		want, digest := loads(oldVersion), po.Digest
		if row.waiting {
			want, digest = loads(newVersion), pn.Digest
		}
		if diff := cmp.Diff(want, n.kernel.calls); diff != "" || r.Verdict.Digest != digest || r.Pending != "" ||
			(err == nil) != (row.err == nil) || fault.Of(err) != fault.Of(row.err) {
			t.Errorf("%s: Run = %s, %v, pending %q; want %s, %v; system calls (-want +got):\n%s", row.name, r.Verdict.Digest,
				err, r.Pending, digest, row.err, diff)
		}
	}
	n := newNode(t, sample.NewCell(t, buildA, newVersion), 1, testkit.NewKey(t))
	n.reboot(t)
	n.parts.Finder = &byWish{}
	a := agent.New(n.cfg, n.parts)
	a.UseLabel((&nodeLabel{err: malformed}).read)
	if r, err := a.Run(t.Context()); !fault.Is(err, fault.Usage) || r.Verdict.State != "" || len(n.kernel.calls) > 0 {
		t.Errorf("a malformed label, no driver: Run = %+v, %v, system calls %v; want usage, and nothing done", r.Verdict, err,
			n.kernel.calls)
	}
}

// slowFarm is a farm during whose answer something happens on the node.
type slowFarm struct {
	byWish
	during func()
}

func (f *slowFarm) Find(ctx context.Context, q resolve.Question) (resolve.Answer, error) {
	a, err := f.byWish.Find(ctx, q)
	if f.during != nil {
		f.during()
	}
	return a, err
}

// labelChanges are what may happen to the label default@NVIDIA_L4 during a run, and whether that ends the run.
var labelChanges = []struct {
	name  string
	label nodeLabel // after the change
	ends  bool
}{
	{"the same label", nodeLabel{wish: "default@NVIDIA_L4"}, false},
	{"an unread label", nodeLabel{err: unread}, false},
	{"another label", nodeLabel{wish: oldVersion}, true},
	{"a removed label", nodeLabel{}, true},
	{"a malformed label", nodeLabel{err: malformed}, true},
}

// TestRelabelledMeanwhile changes the node's label while a run waits for the farm. If the label then asks for another
// driver or is malformed, the run must not make the driver of the former label active: it could stay for ever, if it is
// newer. The next run must follow the label. If the label cannot be read, the last one holds.
func TestRelabelledMeanwhile(t *testing.T) {
	t.Parallel()
	for _, row := range labelChanges {
		for where, set := range map[string]func(n *node){
			"a new node":               func(n *node) { n.reset(t) },
			"another driver is loaded": func(*node) {},
			"no driver is to be loaded": func(n *node) {
				n.reset(t)
				n.cfg.NoLoad = true
			},
		} {
			n, ref, older, newer, po, pn := publishTwo(t, 1)
			set(n)
			farm := &slowFarm{byWish: byWish{has: map[target.Wish]resolve.Answer{
				"default":           answerOf("server", ref, po.Digest, older.Driver),
				oldVersion:          answerOf("server", ref, po.Digest, older.Driver),
				"default@NVIDIA_L4": answerOf("server", ref, pn.Digest, newer.Driver)}}}
			n.parts.Finder, n.kernel.calls = farm, nil
			label := &nodeLabel{wish: "default@NVIDIA_L4"}
			farm.during = func() { *label, farm.during = row.label, nil }
			a := agent.New(n.cfg, n.parts)
			a.UseLabel(label.read)
			r, err := a.Run(t.Context())
			if err != nil || r.Relabelled != row.ends || r.Changed == row.ends || row.ends && len(n.kernel.calls) > 0 ||
				!row.ends && r.Verdict.Digest != pn.Digest {
				t.Errorf("%s, %s: Run = %s, %v, relabelled %t, system calls %v; want nothing done: %t", where, row.name,
					r.Verdict.Digest, err, r.Relabelled, n.kernel.calls, row.ends)
			}
			if !row.ends || row.label.err != nil {
				continue
			}
			if r, err := a.Run(t.Context()); err != nil || r.Verdict.Digest != po.Digest || r.Relabelled {
				t.Errorf("%s, %s: the next Run = %s, %v; want %s", where, row.name, r.Verdict.Digest, err, po.Digest)
			}
		}
	}
}

// reset reboots the node with an empty install folder.
func (n *node) reset(t *testing.T) {
	t.Helper()
	n.reboot(t)
	if err := os.RemoveAll(filepath.Join(n.root, installDir)); err != nil {
		t.Fatal(err)
	}
}

// TestWaitingDriver lets a newer driver wait for the next boot, and asks other sources before that boot. At the boot,
// no source answers and the label cannot be read. The newer driver must be loaded if it still serves the wish, although
// a registry has only the older one; but not if the wish is the older one's version.
func TestWaitingDriver(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		label target.Wish // before the boot
		farm  func(older resolve.Answer) *byWish
		want  string // the version that the boot loads
	}{
		{"a registry that lacks the newer driver", "", func(older resolve.Answer) *byWish {
			older.Source = resolve.SourceRegistry
			return &byWish{has: map[target.Wish]resolve.Answer{"default": older}}
		}, newVersion},
		{"the older version, and a silent farm", oldVersion, func(resolve.Answer) *byWish {
			return &byWish{silent: map[target.Wish]bool{oldVersion: true}}
		}, oldVersion},
	} {
		n, ref, older, newer, po, pn := publishTwo(t, 1)
		n.inUse(t, "1")
		n.parts.Finder = &byWish{has: map[target.Wish]resolve.Answer{
			"default": answerOf("server", ref, pn.Digest, newer.Driver)}}
		if _, err := agent.New(n.cfg, n.parts).Run(t.Context()); !fault.Is(err, fault.Busy) {
			t.Fatalf("Run with a driver in use = %v; want busy", err)
		}
		n.parts.Finder = row.farm(answerOf("server", ref, po.Digest, older.Driver))
		a := agent.New(n.cfg, n.parts)
		a.UseLabel((&nodeLabel{wish: row.label}).read)
		if r, err := a.Run(t.Context()); err != nil || r.Verdict.Digest != po.Digest {
			t.Errorf("%s: Run before the boot = %s, %v; want %s", row.name, r.Verdict.Digest, err, po.Digest)
		}
		n.reboot(t)
		n.kernel.calls = nil
		n.parts.Finder = &byWish{silent: map[target.Wish]bool{"default": true}}
		b := agent.New(n.cfg, n.parts)
		b.UseLabel((&nodeLabel{err: unread}).read)
		_, err := b.Run(t.Context())
		if diff := cmp.Diff(loads(row.want), n.kernel.calls); diff != "" {
			t.Errorf("%s: Run = %v; system calls (-want +got):\n%s", row.name, err, diff)
		}
	}
}

// TestLabelOnSlowNetwork starts a node without a driver before its network works, so that the first reads of the label
// fail. With a time to wait, the run must read the label again. The wait for the label and for the farm must not take
// longer than that time.
func TestLabelOnSlowNetwork(t *testing.T) {
	t.Parallel()
	key, ref := testkit.NewKey(t), layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	for _, row := range []struct {
		name  string
		wait  time.Duration
		lacks time.Duration // how long the network does not work
		reads int           // at least
		away  bool          // whether the farm does not answer
		kind  fault.Kind    // Internal means that the driver is ready
	}{
		{"a short time", 10 * time.Minute, time.Minute, 3, false, fault.Internal},
		{"a short time, and a farm that does not answer", 10 * time.Minute, 6 * time.Minute, 3, true, fault.Transient},
		{"a long time", time.Minute, time.Hour, 3, false, fault.Transient},
		{"no time to wait", 0, time.Minute, 1, false, fault.Transient},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t, c, 1, key)
			n.reboot(t)
			n.cfg.Wait = row.wait
			n.parts.Finder = &byWish{has: map[target.Wish]resolve.Answer{
				"R535": answerOf("server", ref, p.Digest, c.Driver)}, silent: map[target.Wish]bool{"R535": row.away}}
			a := agent.New(n.cfg, n.parts)
			begun, reads := time.Now(), 0
			a.UseLabel(func(context.Context) (target.Wish, error) {
				if reads++; time.Since(begun) < row.lacks {
					return "", unread
				}
				return "R535", nil
			})
			r, err := a.Run(t.Context())
			if took := time.Since(begun); took > row.wait {
				t.Errorf("%s: the run waits for %v; want at most %v", row.name, took, row.wait)
			}
			if reads < row.reads || row.reads == 1 && reads > 1 || (r.Verdict.State == gpucheck.Ready) != (err == nil) ||
				(err == nil) != (row.kind == fault.Internal) || err != nil && !fault.Is(err, row.kind) {
				t.Errorf("%s: Run = %s, %v after %d reads of the label; want %v", row.name, r.Verdict.State, err, reads,
					row.kind)
			}
		})
	}
}
