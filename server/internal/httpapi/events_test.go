package httpapi_test

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/httpapi"
)

// TestWatch checks that a client that watches a build gets every state of the build, including the last one.
func TestWatch(t *testing.T) {
	t.Parallel()
	url := serve(t)
	c := api.NewClient(url, token, nil)
	b, err := c.RequestBuild(t.Context(),
		api.BuildRequest{BuildID: "17800.66.78", Board: "lakitu", Driver: "550.54.15", Flavour: "open"})
	check(t, err)
	var got []string
	err = api.Watch(t.Context(), c, b.ID, func(b api.Build) error {
		got = append(got, fmt.Sprint(b.State, " ", b.Phase))
		switch len(got) { // each event triggers the next change of the build
		case 1:
			_, err := c.UpdateBuild(t.Context(), b.ID,
				api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1, Phase: "compile"})
			return err
		case 2:
			_, err := c.UpdateBuild(t.Context(), b.ID, api.BuildUpdate{Worker: "w", Attempt: 1, Phase: "sign"})
			return err
		}
		_, err := c.Cancel(t.Context(), b.ID)
		if fault.Is(err, fault.Busy) { // the build has ended
			return nil
		}
		return err
	})
	want := []string{"queued ", "building compile", "building sign", "cancelled sign"}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("Watch() = %v (-want +got):\n%s", err, diff)
	}
	if err := api.Watch(t.Context(), c, 99, func(api.Build) error { return nil }); !fault.Is(err, fault.NotFound) {
		t.Errorf("Watch(no build) = %v; want not-found", err)
	}
}

// TestWatchEnds checks that [api.Watch] returns a transient error if the stream ends before the build. The server must
// end a stream when the client leaves or the server stops.
func TestWatchEnds(t *testing.T) {
	t.Parallel()
	short := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("event: build\ndata: {\"id\":1,\"state\":\"queued\"}\n\n:\n\n"))
	}))
	defer short.Close()
	n := 0
	err := api.Watch(t.Context(), api.NewClient(short.URL, "", nil), 1, func(api.Build) error { n++; return nil })
	if !fault.Is(err, fault.Transient) || n != 1 {
		t.Errorf("Watch(short stream) = %v after %d events; want transient after 1", err, n)
	}

	parts, _ := open(t, slog.New(slog.DiscardHandler))
	b, err := parts.Catalogue.Request(t.Context(),
		api.BuildRequest{BuildID: "17800.66.78", Board: "lakitu", Driver: "550.54.15", Flavour: "open"})
	check(t, err)
	stopping := make(chan struct{})
	parts.Stopping = stopping
	ended := make(chan struct{}, 2)
	h := httpapi.New(parts)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(w, r)
		ended <- struct{}{}
	}))
	defer s.Close()
	watch := func(ctx context.Context) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("%s/v1/builds/%d/events", s.URL, b.ID), nil)
		check(t, err)
		resp, err := http.DefaultClient.Do(req)
		check(t, err)
		t.Cleanup(func() { check(t, resp.Body.Close()) })
		if line, err := bufio.NewReader(resp.Body).ReadString('\n'); err != nil || !strings.HasPrefix(line, "event: build") {
			t.Fatalf("first line = %q, %v; want the event's name", line, err)
		}
	}
	leaving, leave := context.WithCancel(t.Context())
	watch(leaving)
	leave()
	<-ended
	watch(t.Context())
	close(stopping)
	<-ended
}
