// Package traces sends the work of a program as OpenTelemetry spans, by OTLP over HTTP, if the standard OTEL_*
// environment variables name a collector. Each run has a span, with a child span for each phase. If the collector
// cannot be reached, the spans are lost, and the log gets a line.
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

// Tracer creates spans. A nil Tracer creates none.
type Tracer struct {
	tracer   api.Tracer
	provider *trace.TracerProvider // nil if no collector is configured
}

// flushTimeout is the longest time for which Close sends the last spans.
const flushTimeout = 5 * time.Second

// Start reads the environment and returns a tracer, which the caller closes. service is the name of this program, such
// as prebake-builder.
func Start(ctx context.Context, service, version string, log *slog.Logger) (*Tracer, error) {
	t := &Tracer{tracer: noop.NewTracerProvider().Tracer("")}
	if wanted, err := tracesWanted(os.Getenv); err != nil || !wanted {
		return t, err
	}
	exporter, err := otlptracehttp.New(ctx) // reads endpoint, headers, certificates and timeout from the environment
	if err != nil {
		return nil, fault.Wrap(
			fault.Usage,
			fmt.Errorf("send traces: %w", err),
			"correct the environment variables OTEL_EXPORTER_OTLP_*",
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
	) // WithFromEnv comes last, so that the environment overrides the values above
	if err != nil {
		return nil, fault.Wrap(
			fault.Usage,
			fmt.Errorf("send traces: %w", err),
			"set OTEL_RESOURCE_ATTRIBUTES in the form name=value,name=value",
		)
	}
	// The OpenTelemetry library has only one global handler for the errors of all exporters.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("traces not sent", "err", err) }))
	t.provider = trace.NewTracerProvider(trace.WithBatcher(exporter), trace.WithResource(about))
	t.tracer = t.provider.Tracer("github.com/prebake/prebake/" + strings.TrimPrefix(service, "prebake-"))
	return t, nil
}

// tracesWanted reports whether the environment asks for traces, by variables that the SDK itself does not interpret.
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
		return false, fault.New(
			fault.Usage,
			fmt.Sprintf("OTEL_TRACES_EXPORTER is %q; want otlp or none", exporter),
			"set OTEL_TRACES_EXPORTER to otlp or none",
		)
	}
	protocol := cmp.Or(env("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"), env("OTEL_EXPORTER_OTLP_PROTOCOL"))
	if protocol != "" && protocol != "http/protobuf" {
		return false, fault.New(fault.Usage, fmt.Sprintf("OTEL_EXPORTER_OTLP_PROTOCOL is %q; want http/protobuf", protocol),
			"set OTEL_EXPORTER_OTLP_PROTOCOL to http/protobuf, and OTEL_EXPORTER_OTLP_ENDPOINT to the "+
				"URL of the collector's HTTP port, which is usually 4318")
	}
	return true, nil
}

// Close sends the remaining spans.
func (t *Tracer) Close() {
	if t == nil || t.provider == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		otel.Handle(err) // a lost span must not make the run fail
	}
}

// Span is the span of one run.
type Span struct {
	t    *Tracer
	ctx  context.Context // has the run's span, for callbacks that have no context
	span api.Span
	open map[string]api.Span
	once sync.Once
}

// Begin starts the span of a run, and returns a context with it. An attribute is a string, an int64, an int or a bool.
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

// End ends the span of a run, and records the result and more attributes. Only the first call has an effect.
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

// Event handles an event of the run's timeline. The timeline never calls it concurrently.
func (s *Span) Event(e timeline.Event) {
	switch {
	case s == nil:
	case e.Done != nil:
		s.Phase(*e.Done)
	case e.Text == "":
		_, s.open[e.Phase] = s.t.tracer.Start(s.ctx, e.Phase)
	}
}

// Phase records the span of a finished phase.
func (s *Span) Phase(p timeline.Phase) {
	if s == nil {
		return
	}
	span := s.open[p.Name]
	if p.Of != "" || span == nil {
		// The phase was measured elsewhere as a part of a running phase, or no event announced its beginning.
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
