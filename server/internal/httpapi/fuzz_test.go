package httpapi_test

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/api"
)

// exchangesWithBody returns the exchanges whose request has a body.
func exchangesWithBody() []exchange {
	return slices.DeleteFunc(exchanges(), func(e exchange) bool { return e.body == "" || e.header["Authorization"] != "" })
}

// FuzzBodies sends arbitrary bodies to every operation that takes a body. The server must accept or refuse each body,
// without an internal error.
func FuzzBodies(f *testing.F) {
	url := serveMirrored(f)
	all := exchangesWithBody()
	for i, e := range all {
		f.Add(i, []byte(e.body))
	}
	send := func(t testing.TB, e exchange) (int, []byte) {
		req, err := http.NewRequestWithContext(t.Context(), e.method, url+strings.ReplaceAll(e.path, "ID", "1"),
			strings.NewReader(e.body))
		check(t, err)
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := http.DefaultClient.Do(req)
		check(t, err)
		answer, err := io.ReadAll(resp.Body)
		check(t, errors.Join(err, resp.Body.Close()))
		return resp.StatusCode, answer
	}
	for range 2 { // makes builds for the calls that report on one
		send(f, all[slices.IndexFunc(all, func(e exchange) bool { return e.operation == "request-build" })])
	}
	f.Fuzz(func(t *testing.T, n int, content []byte) {
		if len(content) > 1<<16 {
			return
		}
		e := all[uint(n)%uint(len(all))]
		e.body = string(content)
		status, answer := send(t, e)
		var p api.Problem
		switch {
		case status >= http.StatusInternalServerError:
			t.Errorf("%s %s %q = %d %s; want no trouble of the server's own", e.method, e.path, content, status, answer)
		case status >= http.StatusBadRequest && (json.Unmarshal(answer, &p) != nil || p.Status != status || p.Detail == ""):
			t.Errorf("%s %s %q = %d %s; want a problem", e.method, e.path, content, status, answer)
		case status < http.StatusBadRequest && len(answer) > 0 && !json.Valid(answer):
			t.Errorf("%s %s %q = %d %s; want JSON", e.method, e.path, content, status, answer)
		}
	})
}
