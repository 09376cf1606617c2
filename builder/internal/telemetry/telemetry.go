// Package telemetry reports the progress of builds. If the standard OTEL_* environment variables give the address of a
// collector, the package sends a trace for each cell, by OTLP over HTTP. A trace has a span for each phase. If the
// operator chooses an address for metrics, the package serves metrics for Prometheus there.
//
// The package refuses to serve anything but metrics. The package refuses to fail a build: if the collector cannot be
// reached, the spans are lost, and one line in the log says so.
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
	// MetricsAddress is the address that serves /metrics, such as 127.0.0.1:9440. "" serves none.
	MetricsAddress string
	// Cache is the cache whose hits and size are reported. If nil, there are no such metrics.
	Cache *cas.Cache
	Log   *slog.Logger
}

// Telemetry sends traces and serves metrics until Close is called. A nil Telemetry accepts every call and does nothing.
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
	// EarlyWarning means that a failure is worth knowing but must not raise an alarm.
	EarlyWarning bool
	// Build is the number of the build in the queue, and Attempt is the number of the attempt. Both are 0 without a queue.
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

// Cell starts the trace of one build. Cell adds a function to line.Watch, so callers must call Cell before they use
// line. At the end of the build, callers call end with the error of the build, or with nil.
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
