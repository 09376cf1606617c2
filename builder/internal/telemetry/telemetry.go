// Package telemetry tells the outside how builds go: a trace for each cell with
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
	"os"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
	api "go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
)

// Config says where to tell what.
type Config struct {
	// Version is this program's.
	Version string
	// MetricsAddress is where /metrics is served, as in 127.0.0.1:9440; "" is nowhere.
	MetricsAddress string
	// Cache is counted and measured; nil leaves it out.
	Cache *cas.Cache
	Log   *slog.Logger
}

// Telemetry is running. A nil one takes every call and does nothing.
type Telemetry struct {
	tracer   api.Tracer
	provider *trace.TracerProvider // nil without traces
	metrics  *metrics
	server   *http.Server // nil without an address
	address  string
	served   chan error
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

// farewell bounds how long the last spans may take to leave.
const farewell = 5 * time.Second

// Start begins telling. Close it. With a Cache, its Count is taken over.
func Start(ctx context.Context, c Config) (*Telemetry, error) {
	t := &Telemetry{tracer: noop.NewTracerProvider().Tracer("")}
	wanted, err := tracesWanted(os.Getenv)
	if err != nil {
		return nil, err
	}
	if wanted {
		if err := t.startTraces(ctx, c); err != nil {
			return nil, err
		}
	}
	t.metrics = newMetrics(c)
	if c.Cache != nil {
		c.Cache.Count = t.metrics.lookup
	}
	if c.MetricsAddress == "" {
		return t, nil
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", c.MetricsAddress)
	if err != nil {
		return nil, errors.Join(fault.Wrap(fault.Usage, fmt.Errorf("serve metrics: %w", err), "give --metrics-address a free one, as in 127.0.0.1:9440"), t.Close())
	}
	t.address = listener.Addr().String()
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", t.metrics.handler())
	t.server = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: time.Minute}
	t.served = make(chan error, 1)
	go func() { t.served <- t.server.Serve(listener) }()
	return t, nil
}

// Address is where metrics are served; "" is nowhere.
func (t *Telemetry) Address() string {
	if t == nil {
		return ""
	}
	return t.address
}

// tracesWanted reads the switches that the SDK's parts leave to the program.
func tracesWanted(env func(string) string) (bool, error) {
	if strings.EqualFold(env("OTEL_SDK_DISABLED"), "true") {
		return false, nil
	}
	switch exporter := env("OTEL_TRACES_EXPORTER"); exporter {
	case "none":
		return false, nil
	case "otlp":
	case "":
		if env("OTEL_EXPORTER_OTLP_ENDPOINT") == "" && env("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") == "" {
			return false, nil
		}
	default:
		return false, fault.New(fault.Usage, fmt.Sprintf("OTEL_TRACES_EXPORTER is %q", exporter), "set OTEL_TRACES_EXPORTER to otlp or none")
	}
	protocol := env("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
	if protocol == "" {
		protocol = env("OTEL_EXPORTER_OTLP_PROTOCOL")
	}
	if protocol != "" && protocol != "http/protobuf" {
		return false, fault.New(fault.Usage, fmt.Sprintf("OTEL_EXPORTER_OTLP_PROTOCOL is %q", protocol), "set it to http/protobuf, and the endpoint to the collector's HTTP port (4318 by custom)")
	}
	return true, nil
}

func (t *Telemetry) startTraces(ctx context.Context, c Config) error {
	exporter, err := otlptracehttp.New(ctx) // endpoint, headers, certificates and timeout by environment
	if err != nil {
		return fault.Wrap(fault.Usage, fmt.Errorf("send traces: %w", err), "check the OTEL_EXPORTER_OTLP_* variables")
	}
	about, err := resource.New(ctx,
		resource.WithAttributes(attribute.String("service.name", "prebake-builder"), attribute.String("service.version", c.Version)),
		resource.WithTelemetrySDK(),
		resource.WithFromEnv()) // last, so that it wins
	if err != nil {
		return fault.Wrap(fault.Usage, fmt.Errorf("send traces: %w", err), "check OTEL_RESOURCE_ATTRIBUTES: name=value,name=value")
	}
	// The library has one place for the troubles of all exporters.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { c.Log.Warn("traces not sent", "err", err) }))
	t.provider = trace.NewTracerProvider(trace.WithBatcher(exporter), trace.WithResource(about))
	t.tracer = t.provider.Tracer("github.com/prebake/prebake/builder")
	return nil
}

// Close sends what is left and stops serving.
func (t *Telemetry) Close() error {
	if t == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	var errs []error
	if t.server != nil {
		errs = append(errs, t.server.Shutdown(ctx))
		if err := <-t.served; !errors.Is(err, http.ErrServerClosed) {
			errs = append(errs, err)
		}
	}
	if t.provider != nil {
		if err := t.provider.Shutdown(ctx); err != nil {
			otel.Handle(err) // no build fails for it
		}
	}
	return errors.Join(errs...)
}

// Cell begins to tell about one build. It hooks itself into line's Watch, so it
// is to be called before line is used; end takes what the build came to.
func (t *Telemetry) Cell(ctx context.Context, c Cell, line *timeline.Run) (_ context.Context, end func(err error)) {
	if t == nil {
		return ctx, func(error) {}
	}
	ctx, span := t.tracer.Start(ctx, "build", api.WithAttributes(
		attribute.String("prebake.kernel", c.Kernel), attribute.String("prebake.driver", c.Driver), attribute.String("prebake.flavour", c.Flavour),
		attribute.Bool("prebake.early_warning", c.EarlyWarning), attribute.Int64("prebake.build", c.Build), attribute.Int("prebake.attempt", c.Attempt)))
	t.metrics.running.Inc()
	w := &watch{t: t, ctx: ctx, next: line.Watch, open: map[string]api.Span{}}
	line.Watch = w.event
	var once sync.Once
	return ctx, func(err error) {
		once.Do(func() {
			t.metrics.running.Dec()
			t.metrics.result(c, err)
			if err != nil {
				span.SetAttributes(attribute.String("prebake.class", fault.Of(err).String()))
				span.SetStatus(codes.Error, err.Error())
			}
			span.End()
		})
	}
}

// watch turns a timeline's events into spans and durations. A timeline never
// calls it concurrently.
type watch struct {
	t    *Telemetry
	ctx  context.Context // carries the build's span to callbacks that have no context
	next func(timeline.Event)
	open map[string]api.Span
}

func (w *watch) event(e timeline.Event) {
	if w.next != nil {
		w.next(e)
	}
	switch {
	case e.Done != nil:
		w.done(*e.Done)
	case e.Text == "":
		_, w.open[e.Phase] = w.t.tracer.Start(w.ctx, e.Phase)
	}
}

func (w *watch) done(p timeline.Phase) {
	w.t.metrics.phase(p)
	end := p.Start.Add(time.Duration(p.Seconds * float64(time.Second)))
	span := w.open[p.Name]
	if p.Of != "" || span == nil {
		// Measured elsewhere: a part of a running phase.
		ctx := w.ctx
		if whole := w.open[p.Of]; whole != nil {
			ctx = api.ContextWithSpan(ctx, whole)
		}
		_, span = w.t.tracer.Start(ctx, p.Name, api.WithTimestamp(p.Start))
	} else {
		delete(w.open, p.Name)
	}
	if p.Note != "" {
		span.SetAttributes(attribute.String("prebake.note", p.Note))
	}
	if p.Failed {
		span.SetStatus(codes.Error, "failed")
	}
	span.End(api.WithTimestamp(end))
}
