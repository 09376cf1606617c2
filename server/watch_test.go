package main

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
)

func TestProgressText(t *testing.T) {
	t.Parallel()
	soon := time.Now().Add(10 * time.Minute)
	late := time.Now().Add(30 * time.Hour)
	for _, row := range []struct {
		in   progress
		want string
	}{
		{progress{Build: api.Build{State: api.Queued}}, "queued"},
		{progress{Build: api.Build{State: api.Queued}, Position: 3, ETA: &late},
			"queued, number 3 in the queue, ready about " + late.Local().Format("2006-01-02 15:04")},
		{progress{Build: api.Build{State: api.Building, Phase: "compile", Attempt: 2}, ETA: &soon},
			"building compile, attempt 2, ready about " + soon.Local().Format("15:04")},
		{progress{Build: api.Build{State: api.Published, Phase: "publish", Attempt: 2}}, "published"},
	} {
		if got := row.in.text(); got != row.want {
			t.Errorf("text() = %q; want %q", got, row.want)
		}
	}
}

// TestFollowWaitsForTheServer cuts the connection to the server while a client follows a build. The client must report
// the trouble once. When the server answers again, the client must report what happened meanwhile.
func TestFollowWaitsForTheServer(t *testing.T) {
	t.Parallel()
	server, _, _ := start(t, t.TempDir(), "--token", scriptToken)
	to, err := url.Parse(server)
	if err != nil {
		t.Fatal(err)
	}
	var cut atomic.Bool
	forward := httputil.NewSingleHostReverseProxy(to)
	between := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if cut.Load() {
			panic(http.ErrAbortHandler)
		}
		forward.ServeHTTP(w, r)
	}))
	defer between.Close()

	c := api.NewClient(server, scriptToken, nil)
	b, err := c.RequestBuild(t.Context(),
		api.BuildRequest{BuildID: "17800.66.78", Board: "lakitu", Driver: "550.54.15", Flavour: "open"})
	if err != nil {
		t.Fatal(err)
	}
	var said []string
	update := func(u api.BuildUpdate) error {
		_, err := c.UpdateBuild(t.Context(), b.ID, u)
		return err
	}
	gone := 0
	got, err := follow(t.Context(), api.NewClient(between.URL, "", nil), b,
		func(error) {
			gone++
			if err := update(api.BuildUpdate{State: api.Failed, Worker: "w", Attempt: 1, Class: "api-break",
				Error: "no"}); err != nil {
				t.Error(err)
			}
			cut.Store(false)
		},
		func(p progress) error {
			said = append(said, p.text())
			switch len(said) {
			case 1:
				return update(api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1, Phase: "compile"})
			case 2:
				cut.Store(true)
				between.CloseClientConnections()
			}
			return nil
		})
	want := []string{"queued, number 1 in the queue", "building compile", "failed"}
	if diff := cmp.Diff(want, said); diff != "" || err != nil || got.State != api.Failed || gone != 1 {
		t.Errorf("follow() = %s, %v, away %d times; want failed, away once (-want +got):\n%s", got.State, err, gone, diff)
	}
}
