package main

import (
	"io"
	"net/http"
	"slices"
	"sync"

	"github.com/rogpeppe/go-internal/testscript"
	otlp "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	span "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// collector stands in for a receiver of traces. It decodes the spans with OTLP's own types, and keeps them.
type collector struct {
	mu    sync.Mutex
	spans []*span.Span
}

type collectorKey struct{}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	raw, err := io.ReadAll(r.Body)
	m := &otlp.ExportTraceServiceRequest{}
	if err != nil || r.URL.Path != "/v1/traces" || proto.Unmarshal(raw, m) != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rs := range m.GetResourceSpans() {
		for _, ss := range rs.GetScopeSpans() {
			c.spans = append(c.spans, ss.GetSpans()...)
		}
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
}

// collected is a script command. It compares the names of the spans below a run's span with the wanted names, and then
// removes all spans.
func collected(ts *testscript.TestScript, neg bool, args []string) {
	c, ok := ts.Value(collectorKey{}).(*collector)
	if !ok || neg || len(args) == 0 {
		ts.Fatalf("usage: collected RUN PHASE...")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var run *span.Span
	for _, s := range c.spans {
		if s.GetName() == args[0] && len(s.GetParentSpanId()) == 0 {
			run = s
		}
	}
	var below []string
	for _, s := range c.spans {
		if string(s.GetParentSpanId()) == string(run.GetSpanId()) && run != nil {
			below = append(below, s.GetName())
		}
	}
	if !slices.Equal(below, args[1:]) {
		ts.Fatalf("below %s are %q; want %q", args[0], below, args[1:])
	}
	c.spans = nil
}
