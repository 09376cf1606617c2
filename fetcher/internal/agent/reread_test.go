package agent_test

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// changing is a verifier that reads its keys again on request. file stands for the keys on the disk, and read for the
// keys in use.
type changing struct {
	file, read atomic.Pointer[trust.Verifier]
}

func (c *changing) Reread() error { c.read.Store(c.file.Load()); return nil }

func (c *changing) Verify(bundles [][]byte, e trust.Expect) (*trust.Verdict, error) {
	return c.read.Load().Verify(bundles, e)
}
func (c *changing) Statement(b []byte) (*trust.Statement, error) { return c.read.Load().Statement(b) }
func (c *changing) Wanted(k target.Kernel) []map[string]string   { return c.read.Load().Wanted(k) }

// TestMonitorReadsKeysAgain changes the trusted keys while Monitor checks a loaded driver. If the driver no longer
// verifies, it must stay loaded, and the verdict must say that the agent will not load it again.
func TestMonitorReadsKeysAgain(t *testing.T) {
	t.Parallel()
	key, other, ref := testkit.NewKey(t), testkit.NewKey(t), layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 1, key)
	n.reboot(t)
	keys := &changing{}
	keys.file.Store(key.Verifier(t))
	n.parts.Verifier, n.parts.Reread = keys, keys.Reread
	n.answer(ref, p.Digest, c.Driver)
	a := agent.New(n.cfg, n.parts)
	if _, err := a.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	loaded := len(n.kernel.calls)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var seen []string
	looks := 0
	err := a.Monitor(ctx, time.Millisecond, watcher(func(v gpucheck.Verdict) {
		reason, _, _ := strings.Cut(v.Reason, ": ")
		if word := string(v.State) + " " + reason; len(seen) == 0 || seen[len(seen)-1] != word {
			seen = append(seen, word)
		}
		switch looks++; looks {
		case 3:
			keys.file.Store(other.Verifier(t))
		case 13:
			keys.file.Store(key.Verifier(t))
		case 25:
			cancel()
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"ready ", "ready it will not be loaded again", "ready "}
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
	if len(n.kernel.calls) != loaded {
		t.Errorf("system calls %v; want none after the run", n.kernel.calls[loaded:])
	}
}
