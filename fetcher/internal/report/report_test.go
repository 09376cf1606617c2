package report_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/report"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

func get(t *testing.T, s *report.Server, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	s.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code, w.Body.String()
}

func TestServer(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	s := report.New(func() time.Time { return now })
	if code, _ := get(t, s, "/healthz"); code != http.StatusOK {
		t.Errorf("healthz = %d; want 200", code)
	}
	if code, _ := get(t, s, "/readyz"); code != http.StatusServiceUnavailable {
		t.Errorf("readyz before any verdict = %d; want 503", code)
	}
	v := gpucheck.Verdict{State: gpucheck.Ready, Driver: target.Driver{Version: "535.1.1", Flavour: target.Open},
		PCIGPUs: 2, UsableGPUs: 2}
	s.Report(v)
	s.ReportRun([]timeline.Phase{{Name: "fetch", Seconds: 1.5}, {Name: "load", Failed: true}},
		fault.New(fault.Busy, "in use", ""))
	s.ReportRun(nil, nil)
	if code, body := get(t, s, "/readyz"); code != http.StatusOK || !strings.Contains(body, `"verdict":"ready"`) {
		t.Errorf("readyz = %d %s; want 200 with the verdict", code, body)
	}
	_, metrics := get(t, s, "/metrics")
	for _, want := range []string{
		"prebake_fetcher_ready 1", "prebake_fetcher_gpus_usable 2",
		`prebake_fetcher_phase_seconds_sum{outcome="ok",phase="fetch"} 1.5`,
		`prebake_fetcher_phase_seconds_bucket{outcome="ok",phase="fetch",le="1"} 0`,
		`prebake_fetcher_phase_seconds_bucket{outcome="ok",phase="fetch",le="2"} 1`,
		`prebake_fetcher_runs_total{class="busy"} 1`, `prebake_fetcher_runs_total{class="none"} 1`,
		`prebake_fetcher_driver_info{digest="",flavour="open",verdict="ready",version="535.1.1"} 1`,
	} {
		if !strings.Contains(metrics, want+"\n") {
			t.Errorf("metrics lack %s:\n%s", want, metrics)
		}
	}
	// A verdict is valid only for a limited time.
	s.Watch(time.Minute)
	ages := func() string {
		_, text := get(t, s, "/metrics")
		var all []string
		for line := range strings.Lines(text) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
			switch name {
			case "prebake_fetcher_ready", "prebake_fetcher_gpus_present", "prebake_fetcher_gpus_usable":
				all = append(all, value)
			}
		}
		return strings.Join(all, " ") // present, usable, ready
	}
	for _, row := range []struct {
		after          time.Duration
		looked, told   bool
		ready, healthy int
	}{
		{50 * time.Second, false, false, 200, 200}, {11 * time.Second, true, false, 503, 200},
		{59 * time.Second, false, false, 503, 200},
		{2 * time.Second, false, false, 503, 503}, {0, true, true, 200, 200},
	} {
		now = now.Add(row.after)
		if row.looked {
			s.Alive()
		}
		if row.told {
			s.Report(v)
		}
		ready, body := get(t, s, "/readyz")
		healthy, _ := get(t, s, "/healthz")
		if ready != row.ready || healthy != row.healthy || ready == 503 &&
			!strings.Contains(body, "last seen at 2026-01-02T03:04:05Z") {
			t.Errorf("%+v: readyz %d %s, healthz %d", row, ready, body, healthy)
		}
		want := "2 2 1"
		if row.ready != http.StatusOK {
			want = "2 0 0"
		}
		if got := ages(); got != want {
			t.Errorf("%+v: GPUs present and usable, and ready = %s; want %s", row, got, want)
		}
	}
	v.State = gpucheck.Unusable
	s.Report(v)
	if code, _ := get(t, s, "/readyz"); code != http.StatusServiceUnavailable {
		t.Errorf("readyz of an unusable GPU = %d; want 503", code)
	}
}

// TestHang checks that the server is not ready during a check that the driver does not answer, and stays alive. Only a
// verdict makes it ready again.
func TestHang(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	s := report.New(func() time.Time { return now })
	s.Watch(6 * time.Minute)
	s.Report(gpucheck.Verdict{State: gpucheck.Ready, PCIGPUs: 2, UsableGPUs: 2})
	for i, row := range []struct {
		do    func()
		after time.Duration
		ready int
	}{
		{s.CheckStarted, 59 * time.Second, 200},
		{s.CheckStopped, 59 * time.Second, 200},
		{s.CheckStarted, time.Minute, 200},
		{func() {}, time.Second, 503},
		{s.CheckStopped, 0, 503}, // a check that fails ends no hang
		{s.Alive, 0, 503},
		{s.CheckStarted, time.Second, 503},
		{func() { s.Report(gpucheck.Verdict{State: gpucheck.Ready, PCIGPUs: 2, UsableGPUs: 2}) }, 0, 200},
	} {
		row.do()
		now = now.Add(row.after)
		ready, body := get(t, s, "/readyz")
		healthy, _ := get(t, s, "/healthz")
		_, metrics := get(t, s, "/metrics")
		if ready != row.ready || healthy != http.StatusOK ||
			ready == 503 && !strings.Contains(body, "the driver has not answered the check since 2026-01-02T03:06:03Z") ||
			strings.Contains(metrics, "prebake_fetcher_ready 1\n") != (ready == 200) {
			t.Errorf("step %d: readyz %d %s, healthz %d; want %d, 200; metrics:\n%s", i, ready, body, healthy, row.ready,
				metrics)
		}
	}
}

func TestRunStops(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	// Run must return when it is cancelled, before or after it listens.
	if err := report.New(time.Now).Run(ctx, "127.0.0.1:0"); err != nil {
		t.Errorf("Run = %v", err)
	}
	if err := report.New(time.Now).Run(t.Context(), "nowhere:port"); err == nil {
		t.Error("Run on a bad address succeeded")
	}
}
