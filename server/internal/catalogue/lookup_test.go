package catalogue_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/catalogue"
)

// mirrorFunc makes a function a mirror.
type mirrorFunc func(ctx context.Context, buildID string) ([]api.Kernel, error)

func (f mirrorFunc) Build(ctx context.Context, buildID string) ([]api.Kernel, error) {
	return f(ctx, buildID)
}

// TestNodesDoNotWaitForTheMirror requests unknown kernels as a node does. The answer must not wait for the mirror. Once
// the server has asked the mirror, a node may request the kernels that the mirror has. Requests for other kernels must
// be refused.
func TestNodesDoNotWaitForTheMirror(t *testing.T) {
	t.Parallel()
	c, q := world(t)
	up := &upstream{}
	looking := false
	ctx, stop := context.WithCancel(t.Context())
	c.Mirror = mirrorFunc(func(ctx context.Context, buildID string) ([]api.Kernel, error) {
		if !looking {
			t.Errorf("a node's request asked the mirror for %s", buildID)
		}
		switch buildID {
		case "2.2.2":
			return nil, fault.New(fault.Transient, "the mirror is away", "")
		case "3.3.3": // the last kernel that the server looks up
			stop()
		}
		return up.Build(ctx, buildID)
	})
	request := func(buildID string, want fault.Kind) {
		t.Helper()
		_, err := c.RequestAs(t.Context(),
			api.BuildRequest{BuildID: buildID, Board: "lakitu", Driver: v261, Flavour: "open"},
			catalogue.Caller{KnownOnly: true})
		if !fault.Is(err, want) || fault.Hint(err) == "" {
			t.Errorf("RequestAs(%s) by a node = %v, hint %q; want %s with a hint", buildID, err, fault.Hint(err), want)
		}
	}
	for _, id := range []string{"19216.104.25", "1.2.3", "2.2.2", "3.3.3"} {
		request(id, fault.TooMany)
	}
	looking = true
	if err := c.LookUpUnknown(ctx); err != nil {
		t.Fatal(err)
	}
	looking = false
	request("1.2.3", fault.Forbidden)
	request("2.2.2", fault.TooMany)
	b, err := c.RequestAs(t.Context(),
		api.BuildRequest{BuildID: "19216.104.25", Board: "lakitu", Driver: v261, Flavour: "open"},
		catalogue.Caller{KnownOnly: true})
	if err != nil || b.State != api.Queued || len(q.jobs) != 1 {
		t.Errorf("RequestAs(kernel of the mirror) = %+v, %v; want queued", b, err)
	}
}

// TestOneLookup requests the same unknown kernel many times. The server must ask the mirror only once, and again after
// a pause.
func TestOneLookup(t *testing.T) {
	t.Parallel()
	c, _ := world(t)
	var clock atomic.Int64
	noon := c.Now()
	c.Now = func() time.Time { return noon.Add(time.Duration(clock.Load())) }
	var asked atomic.Int64
	var begun, done sync.WaitGroup
	c.Mirror = mirrorFunc(func(context.Context, string) ([]api.Kernel, error) {
		asked.Add(1)
		begun.Wait()
		return nil, fault.New(fault.InputMissing, "the mirror has no such COS build", "")
	})
	request := func() {
		_, err := c.Request(t.Context(), api.BuildRequest{BuildID: "1.2.3", Board: "lakitu", Driver: v261, Flavour: "open"})
		if !fault.Is(err, fault.InputMissing) {
			t.Errorf("Request() = %v; want input-missing", err)
		}
	}
	begun.Add(20)
	for range 20 {
		done.Go(func() {
			begun.Done()
			request()
		})
	}
	done.Wait()
	request()
	if n := asked.Load(); n != 1 {
		t.Errorf("21 requests asked the mirror %d times; want once", n)
	}
	clock.Store(int64(2 * time.Minute))
	request()
	if n := asked.Load(); n != 2 {
		t.Errorf("a request after a pause asked the mirror %d times; want once more", n-1)
	}
}
