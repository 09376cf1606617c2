package agent_test

import (
	"context"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// counting counts its compiles, and returns an artifact that was published before.
type counting struct {
	answer resolve.Answer
	calls  int
}

func (c *counting) Build(context.Context, resolve.Question) (resolve.Answer, error) {
	c.calls++
	return c.answer, nil
}

// compiling returns a node with a published driver that works. The farm does not know the driver that the node wants,
// so the node compiles that driver.
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

// TestCompiledWaits checks that a node compiles a driver once, and not again while the driver waits for an idle GPU. It
// compiles again only if its artifact is gone.
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
	n.cfg.Wait = 1 // a farm that is away must not cause a compile either
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

// TestCompiledIsGone checks that a node compiles again if the artifact that it compiled before is gone.
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
	_, _ = n.runAs(t) // the compiler of this test does not restore the artifact
	if b.calls != 2 {
		t.Errorf("compiled %d times; want 2", b.calls)
	}
}

// TestCompiledIsRefused checks that a node does not compile a driver again that failed too often, but by request.
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
