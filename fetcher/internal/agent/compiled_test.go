package agent_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/localbuild"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/program"
	"github.com/prebake/prebake/pkg/timeline"
)

// counting stands in for a compiler on the node. It counts its calls and returns an artifact that the test has
// published.
type counting struct {
	answer resolve.Answer
	calls  int
}

func (c *counting) Build(context.Context, resolve.Question) (resolve.Answer, func() error, error) {
	c.calls++
	return c.answer, noRelease, nil
}

func noRelease() error { return nil }

// compiling returns a node with a published driver that works. The server does not know the driver that the node wants,
// so the node compiles that driver itself.
func compiling(t *testing.T) (n *node, b *counting, old sample.Published) {
	t.Helper()
	farm, own := testkit.NewKey(t), testkit.NewKey(t)
	ref, here := layout(t), layout(t)
	older, newer := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, newVersion)
	old = sample.Publish(t, ref, farm, older)
	b = &counting{answer: answerOf(resolve.SourceNode, here, sample.Publish(t, here, own, newer).Digest, newer.Driver)}
	n = newNode(t, older, 1, farm)
	n.reboot(t)
	if _, err := n.run(t, ref, old.Digest, older.Driver); err != nil {
		t.Fatal(err)
	}
	n.cfg.Wish, n.parts.Local = newVersion, b
	n.parts.NodeVerifier = func() (agent.Verifier, error) { return own.Verifier(t), nil }
	n.parts.Finder = finder{answer: resolve.Answer{State: api.Unknown, Source: resolve.SourceServer}}
	return n, b, old
}

// TestCompiledWaits checks that a node compiles a driver only once, although the driver then waits for hours until no
// program uses the GPU.
func TestCompiledWaits(t *testing.T) {
	t.Parallel()
	n, b, old := compiling(t)
	n.inUse(t, "1")
	for i := range 3 {
		r, err := n.runAs(t)
		if !fault.Is(err, fault.Busy) || r.Verdict.Digest != old.Digest || b.calls != 1 {
			t.Errorf("%d: Run = %s, %v after %d compiles; want busy after one compile", i, r.Verdict.Digest, err, b.calls)
		}
	}
	away := n.parts.Finder
	n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
	n.cfg.Wait = 1 // an unreachable server must not cause another compile
	if _, err := n.runAs(t); !fault.Is(err, fault.Busy) || b.calls != 1 {
		t.Errorf("without a farm: Run = %v after %d compiles; want busy after one compile", err, b.calls)
	}
	n.parts.Finder, n.cfg.Wait = away, 0
	n.inUse(t, "0")
	r, err := n.runAs(t)
	if err != nil || r.Verdict.State != gpucheck.Ready || r.Answer.Source != resolve.SourceNode || b.calls != 1 {
		t.Errorf("with an idle GPU: Run = %+v from %s, %v after %d compiles; want the compiled driver", r.Verdict,
			r.Answer.Source, err, b.calls)
	}
}

// TestCompiledForTypeWaits checks that a node without a farm compiles the driver for a GPU type only once, although the
// driver then waits for an idle GPU. For another GPU type, the node must compile again, because only the compile finds
// out which driver that type needs.
func TestCompiledForTypeWaits(t *testing.T) {
	t.Parallel()
	farm, own := testkit.NewKey(t), testkit.NewKey(t)
	ref, here := layout(t), layout(t)
	older, newer := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, "550.90.07")
	old, p := sample.Publish(t, ref, farm, older), sample.Publish(t, here, own, newer)
	made := answerOf(resolve.SourceNode, here, p.Digest, newer.Driver)
	c := &byType{answers: map[target.Wish]resolve.Answer{"R550@NVIDIA_L4": made, "R550@NVIDIA_T4": made}}
	n := newNode(t, older, 1, farm)
	n.reboot(t)
	if _, err := n.run(t, ref, old.Digest, older.Driver); err != nil {
		t.Fatal(err)
	}
	n.inUse(t, "1")
	n.parts.Local, n.parts.Finder = c, resolve.NoSource{}
	n.parts.NodeVerifier = func() (agent.Verifier, error) { return own.Verifier(t), nil }
	for _, wish := range []target.Wish{"R550@NVIDIA_L4", "R550@NVIDIA_T4"} {
		n.cfg.Wish, c.asked = wish, nil
		for i := range 3 {
			r, err := n.runAs(t)
			if !fault.Is(err, fault.Busy) || r.Verdict.Digest != old.Digest || !slices.Equal(c.asked, []target.Wish{wish}) {
				t.Errorf("%s, run %d: Run = %s, %v after compiles for %v; want busy after one compile", wish, i,
					r.Verdict.Digest, err, c.asked)
			}
		}
	}
	n.inUse(t, "0")
	for range 2 { // the second run keeps the driver
		r, err := n.runAs(t)
		if err != nil || r.Verdict.Digest != p.Digest || r.Verdict.State != gpucheck.Ready || len(c.asked) != 1 {
			t.Errorf("with an idle GPU: Run = %+v, %v after compiles for %v; want the compiled driver", r.Verdict, err, c.asked)
		}
	}
}

// TestCompiledIsGone checks that a node compiles a driver again if the artifact of its former compile was deleted.
func TestCompiledIsGone(t *testing.T) {
	t.Parallel()
	n, b, _ := compiling(t)
	n.inUse(t, "1")
	if _, err := n.runAs(t); !fault.Is(err, fault.Busy) {
		t.Fatal(err)
	}
	if err := os.RemoveAll(strings.TrimPrefix(b.answer.Repository, "oci:")); err != nil {
		t.Fatal(err)
	}
	_, _ = n.runAs(t) // fails, because the fake compiler does not restore the artifact
	if b.calls != 2 {
		t.Errorf("compiled %d times; want 2", b.calls)
	}
}

// TestCompiledIsRefused checks that a node does not compile a driver again after the kernel refused it. Only the flag
// --retry makes the node compile it once more.
func TestCompiledIsRefused(t *testing.T) {
	t.Parallel()
	n, b, old := compiling(t)
	n.kernel.refuse["nvidia "+newVersion] = syscall.ENOENT
	for i := range 5 {
		r, err := n.runAs(t)
		if !fault.Is(err, fault.Rejected) || r.Verdict.Digest != old.Digest || b.calls != 1 {
			t.Errorf("%d: Run = %s, %v after %d compiles; want the former driver after one compile", i, r.Verdict.Digest, err,
				b.calls)
		}
	}
	n.cfg.Retry = true
	if _, err := n.runAs(t); !fault.Is(err, fault.Rejected) || b.calls != 2 {
		t.Errorf("with --retry: Run = %v after %d compiles; want two compiles", err, b.calls)
	}
}

// scripted returns a localbuild.Builder whose program is a shell script. Instead of compiling, the script copies the
// artifact with this digest to the layout that the flag --to names.
func scripted(t *testing.T, from, digest string) localbuild.Builder {
	t.Helper()
	dir := t.TempDir()
	b := localbuild.Builder{Program: filepath.Join(dir, "builder"), StateDir: filepath.Join(dir, "state"),
		CacheDir: filepath.Join(dir, "cache")}
	program.Write(t, b.Program, fmt.Appendf(nil, `#!/bin/sh
set -e
echo "$1" >>"${0%%/*}"/calls
if [ "$1" = keygen ]; then
	for f in "$2" "$2.pub"; do printf -- '-----BEGIN X-----\n-----END X-----\n' >"$f"; done
	exit 0
fi
while [ "$1" != --to ]; do shift; done
cp -r %q "${2#oci:}"
echo '{"digest":%q,"driver":{"version":%q,"flavour":"open"}}'
`, strings.TrimPrefix(from, "oci:"), digest, newVersion))
	return b
}

// compiles returns how often a scripted builder compiled: its script records each call.
func compiles(t *testing.T, b localbuild.Builder) int {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(filepath.Dir(b.Program), "calls"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Count(string(raw), "build\n")
}

// TestCompileIsHeldUntilStaged lets another fetcher try to compile in each phase of a run that compiled a driver. Until
// the driver is staged, the other fetcher must get the error Busy, because its compile would remove the artifact. After
// the run, its compile must succeed.
func TestCompileIsHeldUntilStaged(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name string
		busy bool // whether another installer works at the end of the compile
		bad  bool // whether the compiled driver does not verify
	}{{name: "staged"}, {name: "staged after a wait for another installer", busy: true}, {name: "refused", bad: true}} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			farm, own := testkit.NewKey(t), testkit.NewKey(t)
			made := layout(t)
			c := sample.NewCell(t, buildA, newVersion)
			p := sample.Publish(t, made, own, c)
			n := newNode(t, c, 1, farm)
			n.reboot(t)
			b := scripted(t, made, p.Digest)
			n.cfg.Wish, n.parts.Local = newVersion, b
			n.parts.NodeVerifier = func() (agent.Verifier, error) { return own.Verifier(t), nil }
			if row.bad {
				n.parts.NodeVerifier = func() (agent.Verifier, error) { return farm.Verifier(t), nil }
			}
			n.parts.Finder = finder{answer: resolve.Answer{State: api.Unknown, Source: resolve.SourceServer}}
			other := b
			other.CacheDir += "2"
			q := resolve.Question{Kernel: c.Kernel, Wish: oldVersion, Flavour: "open"}
			n.parts.Line = &timeline.Run{Watch: func(e timeline.Event) {
				if row.busy && e.Phase == "build" && e.Done != nil {
					store, err := install.Open(n.parts.Node, n.cfg.InstallDir, false)
					if err != nil {
						t.Fatal(err)
					}
					unlock, err := store.Lock("tmp/none")
					if err != nil {
						t.Fatal(err)
					}
					time.AfterFunc(time.Second, func() { _ = errors.Join(unlock(), store.Close()) })
				}
				if e.Done != nil || e.Text != "" || !slices.Contains([]string{"verify", "fetch", "stage"}, e.Phase) {
					return
				}
				if _, _, err := other.Build(t.Context(), q); !fault.Is(err, fault.Busy) {
					t.Errorf("another compile in phase %s = %v; want busy", e.Phase, err)
				}
			}}
			r, err := agent.New(n.cfg, n.parts).Run(t.Context())
			if row.bad && !fault.Is(err, fault.Unverified) ||
				!row.bad && (err != nil || r.Verdict.State != gpucheck.Ready || r.Answer.Source != resolve.SourceNode) {
				t.Errorf("Run = %+v, %v", r.Verdict, err)
			}
			if got := compiles(t, b); got != 1 {
				t.Errorf("compiled %d times; want once", got)
			}
			_, release, err := other.Build(t.Context(), q)
			if err != nil {
				t.Fatalf("another compile after the run = %v; want success", err)
			}
			if err := release(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestBusyCompileIsNoReasonToWait checks a run while another fetcher compiles on this node and a program uses the GPU.
// The run must end at once. If it waited until the GPU is idle, it would still end with the same error.
func TestBusyCompileIsNoReasonToWait(t *testing.T) {
	t.Parallel()
	n, b, old := compiling(t)
	other := scripted(t, strings.TrimPrefix(b.answer.Repository, "oci:"), b.answer.Digest)
	_, release, err := other.Build(t.Context(), resolve.Question{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := release(); err != nil {
			t.Error(err)
		}
	}()
	n.inUse(t, "1")
	n.parts.Local, n.cfg.WaitIdle = other, time.Hour
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		r, err := n.runAs(t)
		if took := time.Since(start); took != 0 || !fault.Is(err, fault.Busy) || r.Verdict.Digest != old.Digest {
			t.Errorf("Run = %s, %v after %v; want busy at once, and the present driver", r.Verdict.Digest, err, took)
		}
	})
}

// TestCompileIsNotHeldForIdleGPU lets another installer hold the lock of the install folder for longer than a run waits
// for it. The run, which compiled a driver, must end then. If it waited until the GPU is idle, no other fetcher could
// compile on this node meanwhile.
func TestCompileIsNotHeldForIdleGPU(t *testing.T) {
	t.Parallel()
	n, b, _ := compiling(t)
	n.inUse(t, "1")
	n.cfg.WaitIdle = time.Hour
	n.parts.Local = scripted(t, b.answer.Repository, b.answer.Digest)
	store, err := install.Open(n.parts.Node, n.cfg.InstallDir, false)
	if err != nil {
		t.Fatal(err)
	}
	unlock := func() error { return errors.New("the run compiled nothing") }
	synctest.Test(t, func(t *testing.T) {
		n.parts.Line = &timeline.Run{Watch: func(e timeline.Event) {
			if e.Phase == "build" && e.Done != nil {
				if unlock, err = store.Lock("tmp/none"); err != nil {
					t.Fatal(err)
				}
			}
		}}
		start := time.Now()
		_, err := agent.New(n.cfg, n.parts).Run(t.Context())
		if took := time.Since(start); took != 2*time.Minute || !fault.Is(err, fault.Busy) {
			t.Errorf("Run = %v after %v; want busy after 2m", err, took)
		}
	})
	if err := errors.Join(unlock(), store.Close()); err != nil {
		t.Error(err)
	}
}

// TestCompiledMeanwhile checks two fetchers on one node. The first one waits for an unreachable server. Meanwhile, the
// second one compiles and loads the driver. The first one must not compile the driver again.
func TestCompiledMeanwhile(t *testing.T) {
	t.Parallel()
	n, b, _ := compiling(t)
	synctest.Test(t, func(t *testing.T) {
		first, second := n.parts, n.parts
		first.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
		first.Line, second.Line = &timeline.Run{}, &timeline.Run{}
		cfg := n.cfg
		cfg.Wait = 10 * time.Minute
		ended := make(chan error)
		go func() {
			_, err := agent.New(cfg, first).Run(t.Context())
			ended <- err
		}()
		time.Sleep(30 * time.Second) // meanwhile, the first fetcher waits for the server
		if _, err := agent.New(n.cfg, second).Run(t.Context()); err != nil || b.calls != 1 {
			t.Errorf("the second fetcher: Run = %v after %d compiles; want success after one", err, b.calls)
		}
		if err := <-ended; err != nil || b.calls != 1 {
			t.Errorf("the first fetcher: Run = %v after %d compiles; want success without another", err, b.calls)
		}
	})
}

// byType stands in for a compiler that knows the driver of each GPU type. It records the wishes.
type byType struct {
	answers map[target.Wish]resolve.Answer
	asked   []target.Wish
}

func (c *byType) Build(_ context.Context, q resolve.Question) (resolve.Answer, func() error, error) {
	c.asked = append(c.asked, q.Wish)
	return c.answers[q.Wish], noRelease, nil
}

// TestCompiledForGPUType checks that a node compiles the driver that the farm names for its GPU type, if its driver, or
// the driver that it compiled before, has another version.
func TestCompiledForGPUType(t *testing.T) {
	t.Parallel()
	own := testkit.NewKey(t)
	here := layout(t)
	older, newer := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, newVersion)
	const t4, b200 target.Wish = "default@NVIDIA_T4", "default@NVIDIA_B200"
	compiled := map[target.Wish]resolve.Answer{
		t4:   answerOf(resolve.SourceNode, here, sample.Publish(t, here, own, older).Digest, older.Driver),
		b200: answerOf(resolve.SourceNode, here, sample.Publish(t, here, own, newer).Digest, newer.Driver),
	}
	named := map[target.Wish]resolve.Answer{
		t4:   {State: api.Unknown, Source: resolve.SourceServer, Driver: older.Driver},
		b200: {State: api.Unknown, Source: resolve.SourceServer, Driver: newer.Driver},
	}
	run := func(n *node, wish target.Wish) (*agent.Report, error) {
		n.cfg.Wish, n.parts.Finder = wish, &byWish{has: named}
		return n.runAs(t)
	}
	for name, works := range map[string]bool{"the former driver works": true, "the former driver finds no GPU": false} {
		c := &byType{answers: compiled}
		n := newNode(t, older, 1, testkit.NewKey(t))
		n.reboot(t)
		n.parts.Local = c
		n.parts.NodeVerifier = func() (agent.Verifier, error) { return own.Verifier(t), nil }
		if !works {
			n.kernel.refuse["nvidia "+oldVersion] = syscall.ENODEV
		}
		if _, err := run(n, t4); (err == nil) != works {
			t.Errorf("%s: Run for the wrong GPU type = %v", name, err)
		}
		for range 2 { // the second run must not compile again
			r, err := run(n, b200)
			if err != nil || r.Verdict.Digest != compiled[b200].Digest || !slices.Equal(c.asked, []target.Wish{t4, b200}) {
				t.Errorf("%s: Run = %s, %v after compiles for %v; want the driver compiled for the other GPU type", name,
					r.Verdict.Driver, err, c.asked)
			}
		}
	}
}
