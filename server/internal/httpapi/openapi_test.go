package httpapi_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/go-chi/chi/v5"
	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
	"github.com/pb33f/libopenapi-validator/config"
	validation "github.com/pb33f/libopenapi-validator/errors"
	v3 "github.com/pb33f/libopenapi/datamodel/high/v3"

	"github.com/prebake/prebake/pkg/testkit/golden"
	"github.com/prebake/prebake/server/internal/auth"
	"github.com/prebake/prebake/server/internal/httpapi"
	"github.com/prebake/prebake/server/internal/web"
)

var update = flag.Bool("update", false, "write docs/openapi.yaml anew")

// undescribed has the routes that are not in the API's description, with the reason for each.
var undescribed = map[string]string{
	"GET /":                               "a page for people",
	"GET /builds/{id}":                    "a page for people",
	"GET /cells/{board}/{build}/{driver}": "a page for people",
	"GET /cells/{board}/{build}/{driver}/{flavour}": "a page for people",
	"GET /queue":            "a page for people",
	"GET /warnings":         "a page for people",
	"GET /releases":         "a page for people",
	"GET /preflight":        "a page for people",
	"GET /feed.atom":        "a feed (RFC 4287)",
	"GET /badge.svg":        "a picture",
	"GET /assets/{name}":    "what pages are made of",
	"GET /healthz":          "for whoever restarts the server, one word of text",
	"GET /readyz":           "for whoever restarts the server, lines of text",
	"GET /metrics":          "Prometheus's own format",
	"GET /openapi.json":     "the description itself",
	"GET /openapi.yaml":     "the description itself",
	"GET /openapi-3.0.json": "the description itself, for older tools",
	"GET /openapi-3.0.yaml": "the description itself, for older tools",
}

// bare returns a handler without the parts that need a database.
func bare() http.Handler {
	return httpapi.New(httpapi.Config{Auth: auth.New(auth.Config{}), Log: slog.New(slog.DiscardHandler),
		Pages: http.NotFoundHandler(), PageRoutes: web.Routes, Version: "devel"})
}

// description reads the API's description as clients do.
func description(t *testing.T) []byte {
	t.Helper()
	w := httptest.NewRecorder()
	bare().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/openapi.yaml", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("GET /openapi.yaml = %d", w.Code)
	}
	return w.Body.Bytes()
}

// document parses the description and checks it with the OpenAPI initiative's JSON schema for OpenAPI 3.1, which is
// part of libopenapi-validator.
func document(t *testing.T, raw []byte) (validator.Validator, *v3.Document) {
	t.Helper()
	doc, err := libopenapi.NewDocument(raw)
	check(t, err)
	v, errs := validator.NewValidator(doc, config.WithFormatAssertions())
	check(t, errors.Join(errs...))
	model, err := doc.BuildV3Model()
	check(t, err)
	return v, &model.Model
}

// TestDescription compares the description in docs/ with the server's. To write the file again, run:
//
//	go test ./server/internal/httpapi -run TestDescription -update
func TestDescription(t *testing.T) {
	t.Parallel()
	const file = "../../../docs/openapi.yaml"
	golden.Check(t, *update, description(t), file)
}

func TestDescriptionIsValid(t *testing.T) {
	t.Parallel()
	raw := description(t)
	if !bytes.Contains(raw, []byte("\nopenapi: 3.1.0\n")) {
		t.Error("the description does not say that it is OpenAPI 3.1")
	}
	v, _ := document(t, raw)
	if ok, errs := v.ValidateDocument(); !ok {
		t.Errorf("the description is not valid:\n%s", text(errs))
	}
	broken, _ := document(t, bytes.Replace(raw, []byte("\n  title: Prebake\n"), []byte("\n"), 1))
	if ok, _ := broken.ValidateDocument(); ok {
		t.Error("a description without a title is valid; want a validator that looks")
	}
}

// TestRoutesAreDescribed checks that each route is either described or in undescribed, but not in both.
func TestRoutesAreDescribed(t *testing.T) {
	t.Parallel()
	_, model := document(t, description(t))
	described := map[string]bool{}
	for path, item := range model.Paths.PathItems.FromOldest() {
		for method := range item.GetOperations().FromOldest() {
			described[strings.ToUpper(method)+" "+path] = true
		}
	}
	routes, ok := bare().(chi.Routes)
	if !ok {
		t.Fatal("the handler does not list its routes")
	}
	there := map[string]bool{}
	check(t, chi.Walk(routes, func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		key := method + " " + route
		there[key] = true
		if _, left := undescribed[key]; left == described[key] {
			t.Errorf("%s: described %v, in the list of undescribed routes %v; want exactly one of the two", key,
				described[key], left)
		}
		return nil
	}))
	for key := range described {
		if !there[key] {
			t.Errorf("%s is described, but there is no such route", key)
		}
	}
	for key := range undescribed {
		if !there[key] {
			t.Errorf("%s is in the list of undescribed routes, but there is no such route", key)
		}
	}
}

func text(errs []*validation.ValidationError) string {
	var b strings.Builder
	for _, e := range errs {
		b.WriteString("  " + e.Message + ": " + e.Reason + "\n")
		for _, s := range e.SchemaValidationErrors {
			b.WriteString("    " + s.FieldPath + " " + s.Reason + "\n")
		}
	}
	return b.String()
}

// exchange is one call of an operation.
type exchange struct {
	operation string // its operationId
	method    string
	path      string // TOKEN stands for the ID of the token that an earlier call made
	body      string
	header    map[string]string
	status    int
	// foreign means that the description does not allow this request. The server must then refuse it.
	foreign bool
}

// TestDescriptionIsTrue calls each operation with valid and invalid input. A validator checks that requests and answers
// are as the API's description says. Only a request with foreign set may differ.
func TestDescriptionIsTrue(t *testing.T) {
	t.Parallel()
	v, model := document(t, description(t))
	url := serveMirrored(t)
	good, bad := map[string]bool{}, map[string]bool{}
	made := map[string]string{}
	for _, e := range exchanges() {
		for name, value := range made {
			e.path = strings.ReplaceAll(e.path, name, value)
		}
		req, resp, body := e.call(t, url)
		at := e.operation + ": " + e.method + " " + e.path
		if resp.StatusCode != e.status {
			t.Errorf("%s %.200s = %s; want %d\n%.400s", at, e.body, resp.Status, e.status, body)
		}
		if ok, errs := v.ValidateHttpRequest(req); ok == e.foreign {
			t.Errorf("%s %.200s fits the description: %v; want %v\n%s", at, e.body, ok, !e.foreign, text(errs))
		}
		if ok, errs := v.ValidateHttpResponse(req, resp); !ok {
			t.Errorf("%s: the answer %s %q does not fit the description:\n%s%.400s", at, resp.Status,
				resp.Header.Get("Content-Type"), text(errs), body)
		}
		switch {
		case e.status < 400:
			good[e.operation] = true
		default:
			bad[e.operation] = true
		}
		remember(made, e, body)
	}
	for path, item := range model.Paths.PathItems.FromOldest() {
		for method, op := range item.GetOperations().FromOldest() {
			if !good[op.OperationId] && !testedElsewhere[op.OperationId] ||
				!bad[op.OperationId] && !cannotFail[op.OperationId] {
				t.Errorf("%s %s (%s) has no good and bad call in the table of exchanges; add them", strings.ToUpper(method), path,
					op.OperationId)
			}
		}
	}
}

// call sends a request. The bodies of the returned request and answer can be read again.
func (e exchange) call(t *testing.T, url string) (*http.Request, *http.Response, []byte) {
	t.Helper()
	request := func(ctx context.Context) *http.Request {
		var content io.Reader
		if e.body != "" {
			content = strings.NewReader(e.body)
		}
		req, err := http.NewRequestWithContext(ctx, e.method, url+e.path, content)
		check(t, err)
		if e.body != "" {
			req.Header.Set("Content-Type", "application/json")
		}
		req.Header.Set("Authorization", "Bearer "+token)
		for name, value := range e.header {
			req.Header.Set(name, value)
			if value == "" {
				req.Header.Del(name)
			}
		}
		return req
	}
	resp, err := http.DefaultClient.Do(request(t.Context()))
	check(t, err)
	body, err := io.ReadAll(resp.Body)
	check(t, errors.Join(err, resp.Body.Close()))
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return request(t.Context()), resp, body
}
