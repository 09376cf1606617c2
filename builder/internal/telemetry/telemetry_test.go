package telemetry_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	spans "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/prebake/prebake/builder/internal/telemetry"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
)

var discard = slog.New(slog.DiscardHandler)

// receiver is an OTLP collector that keeps all requests.
type receiver struct {
	*httptest.Server
	mu       sync.Mutex
	requests []*collector.ExportTraceServiceRequest
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	r := &receiver{}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/traces", func(w http.ResponseWriter, req *http.Request) {
		raw, err := io.ReadAll(req.Body)
		if err != nil {
			t.Error(err)
		}
		m := &collector.ExportTraceServiceRequest{}
		if err := proto.Unmarshal(raw, m); err != nil {
			t.Error(err)
		}
		r.mu.Lock()
		r.requests = append(r.requests, m)
		r.mu.Unlock()
		w.Header().Set("Content-Type", "application/x-protobuf")
	})
	r.Server = httptest.NewServer(mux)
	t.Cleanup(r.Close)
	return r
}

// all returns all received spans by name, and the attributes of the resource that sent them.
func (r *receiver) all() (byName map[string]*spans.Span, about map[string]string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	byName, about = map[string]*spans.Span{}, map[string]string{}
	for _, m := range r.requests {
		for _, rs := range m.GetResourceSpans() {
			for _, a := range rs.GetResource().GetAttributes() {
				about[a.GetKey()] = a.GetValue().GetStringValue()
			}
			for _, ss := range rs.GetScopeSpans() {
				for _, s := range ss.GetSpans() {
					byName[s.GetName()] = s
				}
			}
		}
	}
	return byName, about
}

func attributes(s *spans.Span) map[string]string {
	m := map[string]string{}
	for _, a := range s.GetAttributes() {
		if v := a.GetValue().GetStringValue(); v != "" {
			m[a.GetKey()] = v
		}
	}
	return m
}

// build runs a build with three phases. If fail is not nil, the last phase fails with this error.
func build(t *testing.T, tel *telemetry.Telemetry, c telemetry.Cell, fail error) {
	t.Helper()
	clock := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	events := 0
	line := &timeline.Run{Now: func() time.Time { clock = clock.Add(time.Second); return clock },
		Watch: func(timeline.Event) { events++ }}
	_, end := tel.Cell(t.Context(), c, line)
	err := line.Do("source", func() (string, error) { return "from the cache", nil })
	if err != nil {
		t.Fatal(err)
	}
	err = line.Do("compile", func() (string, error) {
		line.Progress("compile", "1/2")
		line.Add(timeline.Phase{Name: "conftest", Of: "compile", Start: clock.Add(100 * time.Millisecond), Seconds: 0.5})
		return "", fail
	})
	end(err)
	end(errors.New("once is enough"))
	if events != 6 {
		t.Errorf("the line's own watcher heard %d events; want 6", events)
	}
}

var cell = telemetry.Cell{Kernel: "17800.0.47/lakitu", Driver: "535.261.03", Flavour: "open", Build: 7, Attempt: 2}

// TestSpans checks that an OTLP collector gets a span for the build, and below it a span for each phase.
func TestSpans(t *testing.T) {
	r := newReceiver(t)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", r.URL)
	t.Setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
	tel, err := telemetry.Start(t.Context(), telemetry.Config{Version: "v1", Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	build(t, tel, cell, fault.New(fault.APIBreak, "a.c:1:1: error: x", ""))
	if err := tel.Close(); err != nil {
		t.Fatal(err)
	}
	got, about := r.all()
	if about["service.name"] != "prebake-builder" || about["service.version"] != "v1" ||
		about["deployment.environment"] != "test" {
		t.Errorf("resource = %v", about)
	}
	parents := map[string]string{}
	for name, s := range got {
		for other, p := range got {
			if string(p.GetSpanId()) == string(s.GetParentSpanId()) {
				parents[name] = other
			}
		}
		if string(s.GetTraceId()) != string(got["build"].GetTraceId()) {
			t.Errorf("span %s is in another trace", name)
		}
	}
	if diff := cmp.Diff(map[string]string{"source": "build", "compile": "build", "conftest": "compile"},
		parents); diff != "" || len(got) != 4 {
		t.Errorf("%d spans, parents (-want +got):\n%s", len(got), diff)
	}
	want := map[string]string{"prebake.kernel": cell.Kernel, "prebake.driver": cell.Driver, "prebake.flavour": "open",
		"prebake.class": "api-break"}
	if diff := cmp.Diff(want, attributes(got["build"])); diff != "" {
		t.Errorf("build's attributes (-want +got):\n%s", diff)
	}
	if s := got["build"].GetStatus(); s.GetCode() != spans.Status_STATUS_CODE_ERROR ||
		s.GetMessage() != "a.c:1:1: error: x" {
		t.Errorf("build's status = %v", s)
	}
	if got["compile"].GetStatus().GetCode() != spans.Status_STATUS_CODE_ERROR ||
		got["source"].GetStatus().GetCode() == spans.Status_STATUS_CODE_ERROR {
		t.Error("the failed phase is not marked, or the good one is")
	}
	if a := attributes(got["source"]); a["prebake.note"] != "from the cache" {
		t.Errorf("source's attributes = %v", a)
	}
	if d := got["conftest"].GetEndTimeUnixNano() - got["conftest"].GetStartTimeUnixNano(); d != uint64(
		500*time.Millisecond) {
		t.Errorf("conftest took %d ns; want half a second", d)
	}
}

// TestCollectorAway checks that a collector that cannot be reached causes no error.
func TestCollectorAway(t *testing.T) {
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
	t.Setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "100")
	tel, err := telemetry.Start(t.Context(), telemetry.Config{Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	build(t, tel, cell, nil)
	if err := tel.Close(); err != nil {
		t.Errorf("Close = %v; want nil, because a collector that cannot be reached is no error", err)
	}
}

func TestEnvironment(t *testing.T) {
	for _, row := range []struct {
		name, variable, value string
		ok, sent              bool
	}{
		{"nothing", "X", "", true, false},
		{"disabled", "OTEL_SDK_DISABLED", "true", true, false},
		{"none", "OTEL_TRACES_EXPORTER", "none", true, false},
		{"other exporter", "OTEL_TRACES_EXPORTER", "zipkin", false, false},
		{"gRPC", "OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", false, false},
		{"HTTP", "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", true, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := newReceiver(t)
			if row.variable != "X" {
				t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", r.URL)
			}
			t.Setenv(row.variable, row.value)
			tel, err := telemetry.Start(t.Context(), telemetry.Config{Log: discard})
			if (err == nil) != row.ok || err != nil && (!fault.Is(err, fault.Usage) || fault.Hint(err) == "") {
				t.Fatalf("Start = %v (%v), hint %q; want ok %t", err, fault.Of(err), fault.Hint(err), row.ok)
			}
			if err != nil {
				return
			}
			build(t, tel, cell, nil)
			if err := tel.Close(); err != nil {
				t.Fatal(err)
			}
			if got, _ := r.all(); (len(got) > 0) != row.sent {
				t.Errorf("%d spans sent; want some: %t", len(got), row.sent)
			}
		})
	}
}

// scrape reads the metrics as Prometheus does.
func scrape(t *testing.T, address string) map[string]*dto.MetricFamily {
	t.Helper()
	res, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("GET /metrics = %d, %v", res.StatusCode, err)
	}
	return families
}

// series returns the values of one family of metrics by their labels.
func series(f *dto.MetricFamily) map[string]float64 {
	m := map[string]float64{}
	for _, s := range f.GetMetric() {
		var labels []string
		for _, l := range s.GetLabel() {
			labels = append(labels, l.GetName()+"="+l.GetValue())
		}
		m[strings.Join(labels, " ")] = s.GetCounter().GetValue() + s.GetGauge().GetValue() + s.GetHistogram().GetSampleSum()
	}
	return m
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	tel, err := telemetry.Start(t.Context(),
		telemetry.Config{Version: "v1", MetricsAddress: "127.0.0.1:0", Cache: cache, Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(tel.Close(), cache.Close()); err != nil {
			t.Error(err)
		}
	})
	build(t, tel, cell, nil)
	early := cell
	early.EarlyWarning = true
	build(t, tel, early, fault.New(fault.OutOfMemory, "x", ""))
	if err := cache.PutFact("verdict", "k", []byte("v")); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"k", "k", "other"} {
		cache.Fact("verdict", key)
	}
	tel.Queue(func(context.Context) (map[string]int, error) { return map[string]int{"available": 3}, nil })
	_, end := tel.Cell(t.Context(), cell, &timeline.Run{})
	defer end(nil)
	got := scrape(t, tel.Address())
	for _, row := range []struct {
		family string
		want   map[string]float64
	}{
		{"prebake_builds_total", map[string]float64{"class=published early_warning=false flavour=open": 1,
			"class=out-of-memory early_warning=true flavour=open": 1}},
		{"prebake_build_phase_seconds",
			map[string]float64{"of= phase=source": 2, "of= phase=compile": 2, "of=compile phase=conftest": 1}},
		{"prebake_cache_lookups_total",
			map[string]float64{"kind=fact:verdict result=hit": 2, "kind=fact:verdict result=miss": 1}},
		{"prebake_queue_jobs", map[string]float64{"state=available": 3}},
		{"prebake_builds_running", map[string]float64{"": 1}},
		{"prebake_builder_info", map[string]float64{"version=v1": 1}},
	} {
		if diff := cmp.Diff(row.want, series(got[row.family])); diff != "" {
			t.Errorf("%s (-want +got):\n%s", row.family, diff)
		}
	}
	if n := series(got["prebake_cache_entries"])["kind=fact:verdict"]; n != 1 {
		t.Errorf("cache entries = %v; want one fact", series(got["prebake_cache_entries"]))
	}
	if series(got["prebake_cache_bytes"])["kind=fact:verdict"] <= 0 {
		t.Errorf("cache bytes = %v; want the bytes of the fact", series(got["prebake_cache_bytes"]))
	}
	// The server must serve no other page.
	if res, err := http.Get("http://" + tel.Address() + "/debug/pprof/"); err != nil ||
		res.StatusCode != http.StatusNotFound {
		t.Errorf("GET /debug/pprof/ = %v, %v; want 404", res, err)
	} else if err := res.Body.Close(); err != nil {
		t.Error(err)
	}
}

// withMetrics returns telemetry that serves metrics until the test ends.
func withMetrics(t *testing.T) *telemetry.Telemetry {
	t.Helper()
	tel, err := telemetry.Start(t.Context(), telemetry.Config{MetricsAddress: "127.0.0.1:0", Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tel.Close(); err != nil {
			t.Error(err)
		}
	})
	return tel
}

// TestEveryClassIsCounted checks that failures of each fault class have a counter of their own.
func TestEveryClassIsCounted(t *testing.T) {
	t.Parallel()
	tel := withMetrics(t)
	want := map[string]float64{}
	for _, k := range fault.Kinds() {
		_, end := tel.Cell(t.Context(), cell, &timeline.Run{})
		end(fault.New(k, "x", ""))
		want["class="+k.String()+" early_warning=false flavour=open"] = 1
	}
	if diff := cmp.Diff(want, series(scrape(t, tel.Address())["prebake_builds_total"])); diff != "" {
		t.Errorf("counters (-want +got):\n%s", diff)
	}
}

// TestMetricsOfABrokenQueue checks that the server still serves the other metrics if the queue does not answer.
func TestMetricsOfABrokenQueue(t *testing.T) {
	t.Parallel()
	tel := withMetrics(t)
	tel.Queue(func(context.Context) (map[string]int, error) { return nil, errors.New("database is locked") })
	if got := scrape(t, tel.Address()); got["prebake_queue_jobs"] != nil || got["prebake_builds_running"] == nil {
		t.Errorf("families = %v; want all but the queue's", got)
	}
}

func TestAddressTaken(t *testing.T) {
	t.Parallel()
	_, err := telemetry.Start(t.Context(),
		telemetry.Config{MetricsAddress: withMetrics(t).Address(), Log: discard})
	if !fault.Is(err, fault.Usage) || !strings.Contains(fault.Hint(err), "--metrics-address") {
		t.Errorf("Start on a taken address = %v, hint %q; want usage and the flag", err, fault.Hint(err))
	}
}

// TestNil checks that all methods accept a nil Telemetry and do nothing.
func TestNil(t *testing.T) {
	t.Parallel()
	var tel *telemetry.Telemetry
	line := &timeline.Run{}
	ctx, end := tel.Cell(t.Context(), cell, line)
	end(nil)
	tel.Queue(nil)
	if ctx != t.Context() || line.Watch != nil || tel.Address() != "" || tel.Close() != nil {
		t.Error("a nil Telemetry did something")
	}
}
