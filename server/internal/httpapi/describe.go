package httpapi

import (
	"net/http"
	"reflect"
	"strconv"

	"github.com/danielgtaylor/huma/v2"
)

// describeRest adds to an operation the responses that every route may send: an error, "too many calls", and "not
// modified".
func describeRest(o *huma.OpenAPI, op *huma.Operation) {
	failed := &huma.MediaType{Schema: o.Components.Schemas.Schema(reflect.TypeFor[problem](), true, "Problem")}
	add := func(status string, r huma.Response) {
		if op.Responses[status] == nil {
			op.Responses[status] = &r
		}
	}
	later := map[string]*huma.Param{
		"Retry-After": {Description: "how long to wait, in seconds", Schema: &huma.Schema{Type: huma.TypeInteger}},
	}
	add("default", huma.Response{
		Description: "an error; the field kind names its kind",
		Content:     map[string]*huma.MediaType{"application/problem+json": failed},
	})
	add(strconv.Itoa(http.StatusServiceUnavailable), huma.Response{
		Description: "the server cannot answer right now; text/plain when it has too much to do",
		Headers:     later,
		Content: map[string]*huma.MediaType{
			"application/problem+json": failed,
			"text/plain":               {Schema: &huma.Schema{Type: huma.TypeString}},
		},
	})
	add(strconv.Itoa(http.StatusTooManyRequests), huma.Response{
		Description: "too many requests",
		Headers:     later,
		Content:     map[string]*huma.MediaType{"application/problem+json": failed},
	})
	if op.Method == http.MethodGet {
		add(strconv.Itoa(http.StatusNotModified), huma.Response{Description: "the client has this content (If-None-Match)"})
	}
}
