package agent_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/testkit"
)

func TestHold(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 1, key)
	if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
		t.Fatal(err)
	}
	n.kernel.calls = nil
	// Between the looks somebody replaces the module, and then puts it back.
	versions := []string{newVersion, oldVersion, newVersion}
	want := []gpucheck.State{gpucheck.Ready, gpucheck.Drifted, gpucheck.Ready}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now()
		var got []gpucheck.State
		err := agent.New(n.cfg, n.parts).Hold(ctx, time.Minute, func(v gpucheck.Verdict) {
			if got = append(got, v.State); len(got) == len(versions) {
				cancel()
				return
			}
			sample.Write(t, n.root, "sys/module/nvidia/version", versions[len(got)]+"\n")
		})
		if err != nil {
			t.Errorf("Hold = %v; want nil when told to stop", err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("verdicts (-want +got):\n%s", diff)
		}
		if took := time.Since(start); took != 3*time.Minute {
			t.Errorf("three looks took %v; want 3m", took)
		}
	})
	if len(n.kernel.calls) > 0 {
		t.Errorf("Hold made system calls: %v", n.kernel.calls)
	}
}
