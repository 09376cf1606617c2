package catalogue_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/server/internal/store"
)

// TestRetryTellsWhy checks that a build keeps the error of its last attempt, both while it waits for the next attempt
// and if no attempt follows.
func TestRetryTellsWhy(t *testing.T) {
	t.Parallel()
	c, _ := world(t)
	b := request(t, c, first, v261, "open")
	update(t, c, b.ID, api.BuildUpdate{State: api.Building})
	update(t, c, b.ID, api.BuildUpdate{State: api.Queued, Class: "transient", Error: "mirror is away\ndetail",
		Hint: "wait"})
	r, err := c.Resolve(t.Context(), first, "lakitu", v261, "open", "")
	if err != nil || r.State != api.Queued || !strings.Contains(r.Reason, "attempt ended with transient: mirror is away") {
		t.Errorf("Resolve() = %s %q, %v; want queued with the reason of the last try", r.State, r.Reason, err)
	}
	if err := c.Abandon(t.Context(), b.ID, "discarded"); err != nil {
		t.Fatal(err)
	}
	got, err := c.Build(t.Context(), b.ID)
	if err != nil || got.State != api.Failed || got.Class != "transient" || got.Error != "mirror is away" ||
		got.Hint != "wait" {
		t.Errorf("Build() = %+v, %v; want failed, as the last try said", got, err)
	}
	other := request(t, c, other, v261, "open")
	if err := c.Abandon(t.Context(), other.ID, "lost"); err != nil {
		t.Fatal(err)
	}
	if got, err = c.Build(t.Context(), other.ID); err != nil || got.Class != "internal" || got.Error != "lost" {
		t.Errorf("Build() = %+v, %v; want internal: lost", got, err)
	}
}

// TestAbandonComesLate abandons builds that have already ended. Their result must not change.
func TestAbandonComesLate(t *testing.T) {
	t.Parallel()
	c, _ := world(t)
	b := request(t, c, first, v261, "open")
	for _, end := range []api.BuildUpdate{
		{State: api.Failed, Class: "api-break", Error: "nv.c:1: error"},
		{State: api.Building},
		{State: api.Published, Digest: digest("1"), Fingerprint: fingerA},
	} {
		update(t, c, b.ID, end)
		if end.State == api.Building {
			continue
		}
		before, err := c.Build(t.Context(), b.ID)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Abandon(t.Context(), b.ID, "lost"); err != nil {
			t.Errorf("Abandon(%s) = %v", end.State, err)
		}
		if after, err := c.Build(t.Context(), b.ID); err != nil || !cmp.Equal(before, after) {
			t.Errorf("Abandon(%s) left %+v, %v; want %+v", end.State, after, err, before)
		}
	}
}

// TestEnqueueAgain queues a build again whose job was lost after its second attempt. The attempts of its new job start
// at 1, and the server must accept them.
func TestEnqueueAgain(t *testing.T) {
	t.Parallel()
	c, _ := world(t)
	if has, err := c.HasBuilds(t.Context()); err != nil || has {
		t.Errorf("HasBuilds() = %t, %v; want none", has, err)
	}
	b := request(t, c, first, v261, "open")
	if has, err := c.HasBuilds(t.Context()); err != nil || !has {
		t.Errorf("HasBuilds() after a request = %t, %v; want builds", has, err)
	}
	update(t, c, b.ID, api.BuildUpdate{State: api.Building, Attempt: 2})
	b = update(t, c, b.ID, api.BuildUpdate{State: api.Queued, Attempt: 2, Class: "transient", Error: "mirror is away"})
	if err := c.Enqueue(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if got := update(t, c, b.ID, api.BuildUpdate{State: api.Building, Attempt: 1}); got.State != api.Building ||
		got.Attempt != 1 {
		t.Errorf("the start of attempt 1 made it %+v; want building, in attempt 1", got)
	}
}

// TestNextAttemptStartsAfresh checks that an attempt starts without phases and without an error, although the attempt
// before it failed or was killed.
func TestNextAttemptStartsAfresh(t *testing.T) {
	t.Parallel()
	phases := []timeline.Phase{{Name: "source", Seconds: 2}}
	failure := func(state api.State) api.BuildUpdate {
		return api.BuildUpdate{State: state, Attempt: 1, Class: "transient", Error: "mirror is away", Hint: "wait",
			Phases: phases}
	}
	for name, end := range map[string][]api.BuildUpdate{
		"killed":             {{Phase: "compile", Phases: phases}},
		"failed and retried": {failure(api.Queued)},
		"failed":             {failure(api.Failed)},
		"failed, and killed when it was retried": {failure(api.Queued), {State: api.Building, Attempt: 2, Worker: "w1"},
			{Phase: "compile", Phases: phases}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, _ := world(t)
			b := request(t, c, first, v261, "open")
			update(t, c, b.ID, api.BuildUpdate{State: api.Building, Attempt: 1, Worker: "w1"})
			for _, u := range end {
				update(t, c, b.ID, u)
			}
			before, err := c.Build(t.Context(), b.ID)
			if err != nil || before.Phase+before.Error == "" || len(before.Phases) == 0 {
				t.Fatalf("the attempt before = %+v, %v; want a phase or an error, and phases", before, err)
			}
			update(t, c, b.ID, api.BuildUpdate{State: api.Building, Attempt: before.Attempt + 1, Worker: "w1"})
			got, err := c.Build(t.Context(), b.ID)
			if err != nil || got.Attempt != before.Attempt+1 || got.Phase != "" || len(got.Phases) > 0 ||
				got.Class+got.Error+got.Hint != "" {
				t.Errorf("the next attempt = %+v, %v; want no phases and no error yet", got, err)
			}
		})
	}
}

func TestUpdateTeachesKernel(t *testing.T) {
	t.Parallel()
	c, _ := open(t) // this catalogue is empty
	b := request(t, c, first, v261, "open")
	k := target.Kernel{BuildID: first, Board: "lakitu", Release: "6.1.0-47", Arch: target.AMD64}
	update(t, c, b.ID, api.BuildUpdate{State: api.Building, Kernel: &k, Fingerprint: fingerA})
	update(t, c, b.ID, api.BuildUpdate{State: api.Published, Digest: digest("1"), Repository: "/prebake/driver"})
	all, _, err := c.Kernels(t.Context(), store.KernelFilter{}, store.Page{})
	if err != nil || len(all) != 1 || all[0].Fingerprint != fingerA || all[0].Release != k.Release {
		t.Errorf("Kernels() = %+v, %v; want what the builder reported", all, err)
	}
	arts, _, err := c.Artifacts(t.Context(), store.ArtifactFilter{}, store.Page{})
	if err != nil || len(arts) != 1 || arts[0].Release != k.Release || arts[0].Kernels[0] != k {
		t.Errorf("Artifacts() = %+v, %v; want one, attested for the build's kernel", arts, err)
	}
	if _, err := c.AddArtifact(t.Context(), api.NewArtifact{Digest: digest("9"), Fingerprint: fingerB,
		Driver: target.Driver{Version: v261, Flavour: target.Open}, Kernels: []target.Kernel{k}}); !fault.Is(err,
		fault.Mismatch) {
		t.Errorf("AddArtifact(wrong fingerprint) = %v; want mismatch", err)
	}
	if _, err := c.AddArtifact(t.Context(), api.NewArtifact{Digest: digest("1"), Fingerprint: fingerA,
		Driver: target.Driver{Version: v309, Flavour: target.Open}, Kernels: []target.Kernel{k}}); !fault.Is(err,
		fault.Mismatch) {
		t.Errorf("AddArtifact(other driver under a known digest) = %v; want mismatch", err)
	}
	if _, err := c.Yank(t.Context(), digest("1"), api.YankRequest{Reason: " "}); !fault.Is(err, fault.Usage) {
		t.Errorf("Yank(no reason) = %v; want usage", err)
	}
	if _, err := c.Yank(t.Context(), digest("7"), api.YankRequest{Reason: "x"}); !fault.Is(err, fault.NotFound) {
		t.Errorf("Yank(absent) = %v; want not-found", err)
	}
}

// TestPhasesOfBuilders reports phases with extreme times and texts. Every answer must still be valid JSON. In UTC, the
// years of these times are outside 0 to 9999, which RFC 3339 does not allow.
func TestPhasesOfBuilders(t *testing.T) {
	t.Parallel()
	c, _ := world(t)
	b := request(t, c, first, v261, "open")
	var phases []timeline.Phase
	text := `[{"name": "late", "start": "9999-12-31T23:59:59-01:00"},
		{"name": "early", "start": "0000-01-01T00:00:00+01:00"},
		{"name": "here", "start": "2026-11-29T12:00:00+02:00", "seconds": 1.5, "failed": true}]`
	if err := json.Unmarshal([]byte(text), &phases); err != nil {
		t.Fatal(err)
	}
	phases[0].Note = strings.Repeat("ü", 5000)
	update(t, c, b.ID, api.BuildUpdate{State: api.Building, Phases: phases})
	r, err := c.Resolve(t.Context(), first, "lakitu", v261, "open", "")
	if err != nil || r.Build == nil || len(r.Build.Phases) != 3 {
		t.Fatalf("Resolve() = %+v, %v; want a build with three phases", r, err)
	}
	single, err := c.Build(t.Context(), b.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, answer := range []any{r, single} {
		if _, err := json.Marshal(answer); err != nil {
			t.Errorf("the answer is no JSON: %v", err)
		}
	}
	if diff := cmp.Diff(single.Phases, r.Build.Phases); diff != "" {
		t.Errorf("the phases differ between the build and its cell:\n%s", diff)
	}
	got := r.Build.Phases
	if !got[0].Start.IsZero() || !got[1].Start.IsZero() || len(got[0].Note) > 5000 ||
		!got[2].Start.Equal(time.Date(2026, 11, 29, 10, 0, 0, 0, time.UTC)) || !got[2].Failed {
		t.Errorf("phases = %.300v", got)
	}
}
