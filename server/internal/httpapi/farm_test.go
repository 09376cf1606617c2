package httpapi_test

import (
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
)

// gauges returns the values of the server's metrics. The keys consist of the metric's name and its labels.
func gauges(t *testing.T, url string) map[string]float64 {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+"/metrics", nil)
	check(t, err)
	resp, err := http.DefaultClient.Do(req)
	check(t, err)
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	check(t, err)
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(string(raw)))
	check(t, err)
	all := map[string]float64{}
	for name, family := range families {
		for _, m := range family.GetMetric() {
			key := name
			for _, l := range m.GetLabel() {
				key += " " + l.GetValue()
			}
			all[key] = m.GetGauge().GetValue()
		}
	}
	return all
}

// TestFarmMetrics checks the metrics for alerts and autoscaling while builds wait, run and end.
func TestFarmMetrics(t *testing.T) {
	t.Parallel()
	url, db := serveLogging(t, slog.New(slog.DiscardHandler))
	c := api.NewClient(url, token, nil)
	want := func(when string, want map[string]float64) {
		t.Helper()
		all := gauges(t, url)
		for name, v := range want {
			if got, ok := all[name]; !ok || got != v {
				t.Errorf("%s: %s = %v, there %v; want %v", when, name, got, ok, v)
			}
		}
	}
	want("with nothing to do", map[string]float64{"prebake_queue_open_jobs": 0, "prebake_queue_oldest_seconds": 0,
		"prebake_builds_failed api-break": 0, "prebake_builds_failed other": 0})

	ask := func(driver string) int64 {
		t.Helper()
		b, err := c.RequestBuild(t.Context(),
			api.BuildRequest{BuildID: "17800.0.47", Board: "lakitu", Driver: driver, Flavour: "open"})
		check(t, err)
		return b.ID
	}
	update := func(id int64, u api.BuildUpdate) {
		t.Helper()
		_, err := c.UpdateBuild(t.Context(), id, u)
		check(t, err)
	}
	first, second := ask("535.261.03"), ask("535.309.01")
	want("two asked for", map[string]float64{"prebake_queue_open_jobs": 2})
	oldest, err := db.OldestQueued(t.Context())
	if got := gauges(t, url)["prebake_queue_oldest_seconds"]; err != nil || got <= 0 ||
		got > time.Since(oldest).Seconds() {
		t.Errorf("prebake_queue_oldest_seconds = %v, asked for %v ago, %v", got, time.Since(oldest), err)
	}
	kernel := target.Kernel{BuildID: "17800.0.47", Board: "lakitu", Release: "6.1.0-47", Arch: target.AMD64}
	for _, id := range []int64{first, second} {
		update(id, api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1, Kernel: &kernel, Fingerprint: finger})
	}
	want("both under way", map[string]float64{"prebake_queue_oldest_seconds": 0})
	update(first, api.BuildUpdate{State: api.Failed, Class: "api-break", Error: "nv.c:1: error"})
	update(second, api.BuildUpdate{State: api.Published, Digest: digest,
		Repository: strings.TrimPrefix(url, "http://") + "/prebake/driver"})
	want("one failed", map[string]float64{"prebake_builds_failed api-break": 1, "prebake_builds_failed transient": 0})
	for _, driver := range []string{"550.54.15", "550.90.07"} { // newer builders may report such classes
		update(ask(driver), api.BuildUpdate{State: api.Failed, Class: "new-" + strings.Repeat("x", len(driver)), Error: "x"})
	}
	want("two failed with unknown classes", map[string]float64{"prebake_builds_failed other": 2})
}

// TestReadyMetrics checks the metrics of the time from the release of a COS build to its artifacts.
func TestReadyMetrics(t *testing.T) {
	t.Parallel()
	url, db := serveLogging(t, slog.New(slog.DiscardHandler))
	c := api.NewClient(url, token, nil)
	b, err := c.RequestBuild(t.Context(),
		api.BuildRequest{BuildID: "17800.0.47", Board: "lakitu", Driver: "535.261.03", Flavour: "open"})
	check(t, err)
	kernel := target.Kernel{BuildID: "17800.0.47", Board: "lakitu", Release: "6.1.0-47", Arch: target.AMD64}
	_, err = c.UpdateBuild(t.Context(), b.ID,
		api.BuildUpdate{State: api.Published, Digest: digest, Kernel: &kernel, Fingerprint: finger,
			Repository: strings.TrimPrefix(url, "http://") + "/prebake/driver"})
	check(t, err)
	took, err := db.ReadyTimes(t.Context(), time.Now().Add(-time.Hour))
	check(t, err)
	all := gauges(t, url)
	if len(took) != 1 || all["prebake_release_to_ready_cells"] != 1 {
		t.Fatalf("%d cells are ready, the metric says %v; want 1", len(took), all["prebake_release_to_ready_cells"])
	}
	for _, percentile := range []string{"50", "90", "99", "100"} {
		if got := all["prebake_release_to_ready_seconds "+percentile]; got != took[0].Seconds() {
			t.Errorf("percentile %s = %v; want %v", percentile, got, took[0].Seconds())
		}
	}
}
