// Package traces sends what a program does as spans, by OTLP over HTTP, where the
// standard OTEL_* environment names a collector: one span for a run, with one below it
// for each phase of its timeline. It refuses to make a run fail: a collector that is away
// costs its spans and a line in the log.
package traces

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
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

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
)

// Tracer makes spans. A nil one makes none.
type Tracer struct {
	tracer   api.Tracer
	provider *trace.TracerProvider // nil where nobody collects
}

// flushTimeout bounds how long the last spans may take to leave.
const flushTimeout = 5 * time.Second

// Start reads the environment. service is this program's name, as in prebake-builder. The
// caller closes the tracer.
func Start(ctx context.Context, service, version string, log *slog.Logger) (*Tracer, error) {
	t := &Tracer{tracer: noop.NewTracerProvider().Tracer("")}
	if wanted, err := wanted(os.Getenv); err != nil || !wanted {
		return t, err
	}
	exporter, err := otlptracehttp.New(ctx) // endpoint, headers, certificates and timeout by environment
	if err != nil {
		return nil, fault.Wrap(
			fault.Usage,
			fmt.Errorf("send traces: %w", err),
			"check the OTEL_EXPORTER_OTLP_* variables",
		)
	}
	about, err := resource.New(
		ctx,
		resource.WithAttributes(
			attribute.String("service.name", service),
			attribute.String("service.version", version),
		),
		resource.WithTelemetrySDK(),
		resource.WithFromEnv(),
	) // last, so that it wins
	if err != nil {
		return nil, fault.Wrap(
			fault.Usage,
			fmt.Errorf("send traces: %w", err),
			"check OTEL_RESOURCE_ATTRIBUTES: name=value,name=value",
		)
	}
	// The library has one place for the troubles of all exporters.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("traces not sent", "err", err) }))
	t.provider = trace.NewTracerProvider(trace.WithBatcher(exporter), trace.WithResource(about))
	t.tracer = t.provider.Tracer("github.com/prebake/prebake/" + strings.TrimPrefix(service, "prebake-"))
	return t, nil
}

// wanted reads the switches that the SDK's parts leave to the program.
func wanted(env func(string) string) (bool, error) {
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
		return false, fault.New(
			fault.Usage,
			fmt.Sprintf("OTEL_TRACES_EXPORTER is %q", exporter),
			"set OTEL_TRACES_EXPORTER to otlp or none",
		)
	}
	protocol := cmp.Or(env("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"), env("OTEL_EXPORTER_OTLP_PROTOCOL"))
	if protocol != "" && protocol != "http/protobuf" {
		return false, fault.New(fault.Usage, fmt.Sprintf("OTEL_EXPORTER_OTLP_PROTOCOL is %q", protocol),
			"set it to http/protobuf, and the endpoint to the collector's HTTP port (usually 4318)")
	}
	return true, nil
}

// Close sends what is left.
func (t *Tracer) Close() {
	if t == nil || t.provider == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		otel.Handle(err) // nothing fails for it
	}
}

// Span is a run that is being told of.
type Span struct {
	t    *Tracer
	ctx  context.Context // carries the run's span to callbacks that have no context
	span api.Span
	open map[string]api.Span
	once sync.Once
}

// Begin begins the span of a run, and returns a context that carries it. Attributes are
// pairs of a name and a string, an int64, an int or a bool.
func (t *Tracer) Begin(ctx context.Context, name string, attributes map[string]any) (context.Context, *Span) {
	if t == nil {
		return ctx, nil
	}
	ctx, span := t.tracer.Start(ctx, name, api.WithAttributes(keyValues(attributes)...))
	return ctx, &Span{t: t, ctx: ctx, span: span, open: map[string]api.Span{}}
}

func keyValues(attributes map[string]any) []attribute.KeyValue {
	var all []attribute.KeyValue
	for name, value := range attributes {
		switch v := value.(type) {
		case string:
			all = append(all, attribute.String(name, v))
		case int64:
			all = append(all, attribute.Int64(name, v))
		case int:
			all = append(all, attribute.Int(name, v))
		case bool:
			all = append(all, attribute.Bool(name, v))
		}
	}
	return all
}

// End ends the span of a run, once, with what it came to and attributes that are only
// known now.
func (s *Span) End(err error, attributes map[string]any) {
	if s == nil {
		return
	}
	s.once.Do(func() {
		s.span.SetAttributes(keyValues(attributes)...)
		if err != nil {
			s.span.SetAttributes(attribute.String("prebake.class", fault.Of(err).String()))
			s.span.SetStatus(codes.Error, err.Error())
		}
		s.span.End()
	})
}

// Event takes an event of the run's timeline, which never calls it concurrently.
func (s *Span) Event(e timeline.Event) {
	switch {
	case s == nil:
	case e.Done != nil:
		s.Phase(*e.Done)
	case e.Text == "":
		_, s.open[e.Phase] = s.t.tracer.Start(s.ctx, e.Phase)
	}
}

// Phase makes the span of a phase that is over.
func (s *Span) Phase(p timeline.Phase) {
	if s == nil {
		return
	}
	span := s.open[p.Name]
	if p.Of != "" || span == nil {
		// Measured elsewhere: a part of a running phase, or nobody heard it begin.
		ctx := s.ctx
		if whole := s.open[p.Of]; whole != nil {
			ctx = api.ContextWithSpan(ctx, whole)
		}
		_, span = s.t.tracer.Start(ctx, p.Name, api.WithTimestamp(p.Start))
	} else {
		delete(s.open, p.Name)
	}
	if p.Note != "" {
		span.SetAttributes(attribute.String("prebake.note", p.Note))
	}
	if p.Failed {
		span.SetStatus(codes.Error, "failed")
	}
	span.End(api.WithTimestamp(p.Start.Add(time.Duration(p.Seconds * float64(time.Second)))))
}
