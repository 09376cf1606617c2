// Package telemetry reports how builds go: a trace for each cell with
// a span for each phase, sent by OTLP over HTTP where the standard OTEL_*
// environment names a collector, and metrics for Prometheus on an address of
// the operator's choice. Without either it does nothing.
//
// It refuses to serve anything but metrics, and to fail a build: a collector
// that is away costs its spans and a line in the log.
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

// Config says where to tell what.
type Config struct {
	// Version is this program's.
	Version string
	// MetricsAddress is where /metrics is served, as in 127.0.0.1:9440; "" means nowhere.
	MetricsAddress string
	// Cache is counted and measured; nil leaves it out.
	Cache *cas.Cache
	Log   *slog.Logger
}

// Telemetry is running. A nil one takes every call and does nothing.
type Telemetry struct {
	tracer  *traces.Tracer
	metrics *metrics
	server  *http.Server // nil without an address
	address string
	served  chan error
}

// Cell is what one build makes.
type Cell struct {
	// Kernel is BUILD_ID/board, Driver a version or a wish.
	Kernel, Driver, Flavour string
	// EarlyWarning says that a failure is of interest and no alarm.
	EarlyWarning bool
	// Build and Attempt are the queue's, 0 without one.
	Build   int64
	Attempt int
}

// flushTimeout bounds how long the last spans may take to leave.
const flushTimeout = 5 * time.Second

// Start begins telling. Close it. With a Cache, its Count is taken over.
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

// Address is where metrics are served; "" means nowhere.
func (t *Telemetry) Address() string {
	if t == nil {
		return ""
	}
	return t.address
}

// Close sends what is left and stops serving.
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

// Cell begins to tell about one build. It hooks itself into line's Watch, so it
// is to be called before line is used; end takes what the build came to.
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
