package api_test

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// slow is the reader of a log. It makes a pause before each part.
type slow struct {
	parts int
	pause time.Duration
}

func (s *slow) Read(p []byte) (int, error) {
	if s.parts == 0 {
		return 0, io.EOF
	}
	s.parts--
	time.Sleep(s.pause)
	return copy(p, "line\n"), nil
}

// reader is a fake server. It reads the whole request. If most is not 0, it stops after that many bytes.
type reader struct{ most int }

func (r reader) RoundTrip(req *http.Request) (*http.Response, error) {
	buf := make([]byte, 5)
	for got := 0; ; {
		if r.most > 0 && got >= r.most {
			<-req.Context().Done()
			return nil, req.Context().Err()
		}
		n, err := req.Body.Read(buf)
		if cause := context.Cause(req.Context()); cause != nil {
			return nil, cause
		}
		if got += n; err == io.EOF {
			return &http.Response{StatusCode: http.StatusNoContent, Body: http.NoBody, Request: req}, nil
		} else if err != nil {
			return nil, err
		}
	}
}

// TestPutBuildLogTakesItsTime checks that PutBuildLog sends a slow log completely, and that it ends a transfer that
// makes no progress for a minute.
func TestPutBuildLogTakesItsTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := api.NewClient("http://server.example", "", &http.Client{Transport: reader{}})
		begin := time.Now()
		if err := c.PutBuildLog(t.Context(), 1, &slow{parts: 10, pause: 50 * time.Second}); err != nil {
			t.Errorf("PutBuildLog(ten parts in 500 s) = %v after %v; want it sent", err, time.Since(begin))
		}
		c = api.NewClient("http://server.example", "", &http.Client{Transport: reader{most: 10}})
		err := c.PutBuildLog(t.Context(), 1, strings.NewReader(strings.Repeat("line\n", 100)))
		if !fault.Is(err, fault.Transient) {
			t.Errorf("PutBuildLog(server that takes no more) = %v; want transient", err)
		}
	})
}
