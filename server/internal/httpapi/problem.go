package httpapi

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"path"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/danielgtaylor/huma/v2"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// problem is a response with an error. The router calls its methods for the status and the media type.
type problem struct {
	api.Problem
	cause error // for the server's log
}

func (p *problem) Error() string             { return p.Detail }
func (p *problem) GetStatus() int            { return p.Status }
func (p *problem) ContentType(string) string { return "application/problem+json" }

// problemOf returns the response for an error. The error's kind decides the status. The server's own errors get a
// general text, because their text may name the database's host and user.
func problemOf(err error) api.Problem {
	kind := fault.Of(err)
	p := api.Problem{Title: kind.What(), Status: kind.HTTPStatus(), Kind: kind, Detail: err.Error(), Hint: fault.Hint(err)}
	if p.Status >= http.StatusInternalServerError {
		p.Detail, p.Hint = PublicText(kind), ""
	}
	return p
}

// PublicText returns the text that clients get if the server itself failed.
func PublicText(kind fault.Kind) string {
	switch kind {
	case fault.DiskFull:
		return "the server's disk is full; the server's log has the cause"
	case fault.Internal:
		return "internal error; the server's log has the cause"
	}
	return "the server cannot answer right now; ask again; the server's log has the cause"
}

func asProblem(err error) huma.StatusError { return &problem{problemOf(err), err} }

// fail responds with an error. It logs the server's own errors.
func fail(w http.ResponseWriter, r *http.Request, log *slog.Logger, err error) {
	p := problemOf(err)
	if p.Status >= http.StatusInternalServerError {
		log.ErrorContext(r.Context(), "request failed", "method", r.Method, "path", r.URL.Path, "err", err)
	}
	writeProblem(w, p)
}

// logFailures logs the server's own errors, whose text no response contains.
func logFailures(log *slog.Logger) huma.Transformer {
	return func(ctx huma.Context, _ string, v any) (any, error) {
		if p, ok := v.(*problem); ok && p.cause != nil && p.Status >= http.StatusInternalServerError {
			log.ErrorContext(ctx.Context(), "request failed", "method", ctx.Method(), "path", ctx.URL().Path, "err", p.cause)
		}
		return v, nil
	}
}

// ownErrors makes the router respond with errors of this package, for example for invalid JSON. The library has only a
// package variable for this.
var ownErrors = sync.OnceFunc(func() {
	huma.NewError = func(status int, text string, errs ...error) huma.StatusError {
		var detail []string
		for _, err := range errs {
			if err != nil {
				detail = append(detail, err.Error())
			}
		}
		if len(detail) == 0 {
			detail = []string{text}
		}
		kind := fault.Usage
		switch {
		case status == http.StatusRequestEntityTooLarge:
			kind = fault.TooLarge
		case status == http.StatusRequestTimeout:
			kind = fault.TimedOut
		case status >= http.StatusInternalServerError:
			kind = fault.Internal
		}
		p := problemOf(fault.New(kind, strings.Join(detail, "; "), "find the fields of this request in /openapi.json"))
		if kind == fault.TimedOut {
			p.Status = status // 504 would blame the server
		}
		return &problem{Problem: p}
	}
})

// refuseUnknown is a middleware that refuses unknown query parameters. Without this check, a list with a misspelled
// filter would have all entries.
func refuseUnknown(a huma.API) func(huma.Context, func(huma.Context)) {
	return func(ctx huma.Context, next func(huma.Context)) {
		u := ctx.URL()
		for name := range u.Query() {
			known := slices.ContainsFunc(
				ctx.Operation().Parameters,
				func(p *huma.Param) bool { return p.In == "query" && p.Name == name },
			)
			if !known {
				writeHuma(
					a,
					ctx,
					problemOf(
						fault.New(
							fault.Usage,
							fmt.Sprintf("this path has no query parameter %.80q", name),
							"find the parameters of this path in /openapi.json",
						),
					),
				)
				return
			}
		}
		next(ctx)
	}
}

func writeHuma(a huma.API, ctx huma.Context, p api.Problem) {
	ctx.SetHeader("Content-Type", "application/problem+json")
	ctx.SetStatus(p.Status)
	_ = a.Marshal(ctx.BodyWriter(), "application/json", p) // an error means that the client is gone
}

func writeProblem(w http.ResponseWriter, p api.Problem) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(p) // an error means that the client is gone
}

func writeText(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write([]byte(text)) // an error means that the client is gone
}

// apiConfig returns the configuration of the router and of the description. It leaves out two defaults of the router:
// the member $schema in responses, and a page with scripts from other hosts.
func apiConfig(version string, log *slog.Logger) huma.Config {
	names := func(t reflect.Type, hint string) string {
		name := huma.DefaultSchemaNamer(t, hint)
		for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
			t = t.Elem()
		}
		if path.Base(t.PkgPath()) == "target" { // api.Kernel and target.Kernel differ
			return "Target" + name
		}
		return name
	}
	return huma.Config{
		OpenAPI: &huma.OpenAPI{
			OpenAPI:        "3.1.0",
			OnAddOperation: []huma.AddOpFunc{describeRest},
			Info:           &huma.Info{Title: "Prebake", Version: version, Description: "NVIDIA drivers for COS, built ahead."},
			Components: &huma.Components{
				Schemas: huma.NewMapRegistry("#/components/schemas/", names),
				SecuritySchemes: map[string]*huma.SecurityScheme{schemeName: {Type: "http", Scheme: "bearer",
					Description: "a token that has the scope; the first token has all of them"}},
			},
		},
		OpenAPIPath:      "/openapi",
		Formats:          map[string]huma.Format{"application/json": huma.DefaultJSONFormat, "json": huma.DefaultJSONFormat},
		DefaultFormat:    "application/json",
		NoFormatFallback: false,
		Transformers:     []huma.Transformer{logFailures(log)},
	}
}
