// Package telemetry reports the progress of builds. If the OTEL_* environment variables give a collector, it sends a
// trace for each cell by OTLP over HTTP. A trace has a span for each phase. The package also serves metrics for
// Prometheus, at the address in Config.MetricsAddress.
//
// The package serves nothing but metrics and never fails a build. If the collector cannot be reached, the spans are
// lost, and one line in the log says so.
package telemetry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/traces"
)

// Config says what to report and where.
type Config struct {
	// Version is the version of this program.
	Version string
	// MetricsAddress is the address that serves /metrics, such as 127.0.0.1:9440. "" means that no metrics are served.
	MetricsAddress string
	// Cache is the cache whose hits and size are reported. If nil, there are no such metrics.
	Cache *cas.Cache
	Log   *slog.Logger
}

// Telemetry sends traces and serves metrics until Close is called. A nil Telemetry does nothing.
type Telemetry struct {
	tracer  *traces.Tracer
	metrics *metrics
	server  *http.Server // nil without an address
	address string
	served  chan error
}

// Cell describes one build.
type Cell struct {
	// Kernel is BUILD_ID/board. Driver is a version or a wish.
	Kernel, Driver, Flavour string
	// EarlyWarning is true if a failure of this build must not raise an alarm.
	EarlyWarning bool
	// Build is the build's number in the queue, and Attempt the attempt's number. Both are 0 without a queue.
	Build   int64
	Attempt int
}

// flushTimeout is the time limit for sending the last spans.
const flushTimeout = 5 * time.Second

// Start starts traces and metrics. The caller closes the result. If Cache is set, Start replaces its Count function.
func Start(ctx context.Context, c Config) (*Telemetry, error) {
	tracer, err := traces.Start(ctx, "prebake-builder", c.Version, c.Log)
	if err != nil {
		return nil, err
	}
	t := &Telemetry{tracer: tracer}
	t.metrics = newMetrics(c)
	if c.Cache != nil {
		c.Cache.Count = t.metrics.lookup
	}
	if c.MetricsAddress == "" {
		return t, nil
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", c.MetricsAddress)
	if err != nil {
		return nil, errors.Join(fault.Wrap(fault.Usage, fmt.Errorf("serve metrics: %w", err),
			"give --metrics-address a free address, such as 127.0.0.1:9440"), t.Close())
	}
	t.address = listener.Addr().String()
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", t.metrics.handler())
	t.server = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: time.Minute}
	t.served = make(chan error, 1)
	go func() { t.served <- t.server.Serve(listener) }()
	return t, nil
}

// Address returns the address at which metrics are served, or "" if they are not served.
func (t *Telemetry) Address() string {
	if t == nil {
		return ""
	}
	return t.address
}

// Close sends the remaining spans and stops the server.
func (t *Telemetry) Close() error {
	if t == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
	defer cancel()
	var errs []error
	if t.server != nil {
		errs = append(errs, t.server.Shutdown(ctx))
		if err := <-t.served; !errors.Is(err, http.ErrServerClosed) {
			errs = append(errs, err)
		}
	}
	t.tracer.Close()
	return errors.Join(errs...)
}

// Cell starts the trace of one build. Call Cell before the timeline is used, because Cell adds a function to its Watch.
// At the end of the build, call the returned function with the build's error or nil.
func (t *Telemetry) Cell(ctx context.Context, c Cell, line *timeline.Run) (_ context.Context, end func(err error)) {
	if t == nil {
		return ctx, func(error) {}
	}
	ctx, span := t.tracer.Begin(ctx, "build", map[string]any{
		"prebake.kernel": c.Kernel, "prebake.driver": c.Driver, "prebake.flavour": c.Flavour,
		"prebake.early_warning": c.EarlyWarning, "prebake.build": c.Build, "prebake.attempt": c.Attempt,
	})
	t.metrics.running.Inc()
	next := line.Watch
	line.Watch = func(e timeline.Event) {
		if next != nil {
			next(e)
		}
		span.Event(e)
		if e.Done != nil {
			t.metrics.phase(*e.Done)
		}
	}
	var once sync.Once
	return ctx, func(err error) {
		once.Do(func() {
			t.metrics.running.Dec()
			t.metrics.result(c, err)
			span.End(err, nil)
		})
	}
}
