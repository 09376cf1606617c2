package kube

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// silence is an API server that never answers.
type silence struct{}

func (silence) RoundTrip(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

// TestWanted checks the wish in a node's label, and the error if there is none.
func TestWanted(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		labels map[string]string
		status int
		want   target.Wish
		kind   fault.Kind // Internal means no error
	}{
		{"no label", nil, 0, "", fault.Internal},
		{"other labels", map[string]string{labelVersion: "535.261.03"}, 0, "", fault.Internal},
		{"a branch", map[string]string{LabelWanted: "R580"}, 0, "R580", fault.Internal},
		{"a GPU type's default", map[string]string{LabelWanted: "default.NVIDIA_H100_80GB"}, 0, "default@NVIDIA_H100_80GB",
			fault.Internal},
		{"a malformed label", map[string]string{LabelWanted: "newest"}, 0, "", fault.Usage},
		{"an empty label", map[string]string{LabelWanted: ""}, 0, "", fault.Usage},
		{"no right", nil, http.StatusForbidden, "", fault.Forbidden},
		{"no such node", nil, http.StatusNotFound, "", fault.Transient},
		{"a server that fails", nil, http.StatusInternalServerError, "", fault.Transient},
	} {
		o := &oneNode{refuse: map[string]int{"read": row.status}}
		o.node.Metadata.Labels = row.labels
		got, err := o.fetcher().Wanted(t.Context())
		if got != row.want || (err == nil) != (row.kind == fault.Internal) ||
			err != nil && (!fault.Is(err, row.kind) || fault.Hint(err) == "") ||
			errors.Is(err, ErrLabel) != (row.kind == fault.Usage) {
			t.Errorf("%s: Wanted = %q, %v (hint %q); want %q, %v", row.name, got, err, fault.Hint(err), row.want, row.kind)
		}
	}
}

// TestWantedFromSilence checks that a cluster that does not answer holds a run up for seconds only.
func TestWantedFromSilence(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := (&oneNode{}).fetcher()
		n.api.http.Transport = silence{}
		start := time.Now()
		if _, err := n.Wanted(t.Context()); !fault.Is(err, fault.Transient) || time.Since(start) != labelTimeout {
			t.Errorf("Wanted = %v after %v; want transient after %v", err, time.Since(start), labelTimeout)
		}
	})
}

// TestAwaitLabel checks that AwaitLabel ends when the label has another value than Wanted read, and not after an error.
func TestAwaitLabel(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name    string
		was, is map[string]string
		status  int // of the read of Wanted
		want    bool
	}{
		{"a new label", nil, map[string]string{LabelWanted: "R580"}, 0, true},
		{"another label", map[string]string{LabelWanted: "R535"}, map[string]string{LabelWanted: "R580"}, 0, true},
		{"a corrected label", map[string]string{LabelWanted: "x"}, map[string]string{LabelWanted: "R580"}, 0, true},
		{"a removed label", map[string]string{LabelWanted: "R535"}, nil, 0, true},
		{"the same label", map[string]string{LabelWanted: "R535"}, map[string]string{LabelWanted: "R535", "zone": "a"}, 0,
			false},
		{"the same malformed label", map[string]string{LabelWanted: "x"}, map[string]string{LabelWanted: "x"}, 0, false},
		{"no label before and after", nil, map[string]string{"zone": "a"}, 0, false},
		{"a label that was not read before", nil, nil, http.StatusInternalServerError, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			o := &oneNode{refuse: map[string]int{"read": row.status}}
			o.node.Metadata.Labels = row.was
			n := o.fetcher()
			_, _ = n.Wanted(t.Context()) // TestWanted checks its errors
			start := time.Now()
			n.api.http.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
				if time.Since(start) <= 5*time.Minute {
					return nil, errors.New("connection refused")
				}
				return (&oneNode{node: node{Metadata: metadata{Labels: row.is}}}).RoundTrip(r)
			})
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute+time.Second)
			defer cancel()
			took := 10*time.Minute + time.Second
			if row.want {
				took = 6 * time.Minute
			}
			if got := n.AwaitLabel(ctx); got != row.want || time.Since(start) != took {
				t.Errorf("%s: AwaitLabel = %t after %v; want %t after %v", row.name, got, time.Since(start), row.want, took)
			}
		})
	}
}

// TestWantedReadsMetadataOnly checks that a read of the label asks for the node's metadata alone: a node object has
// some hundred kilobytes.
func TestWantedReadsMetadataOnly(t *testing.T) {
	t.Parallel()
	var accept string
	n := (&oneNode{}).fetcher()
	n.api.http.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
		accept = r.Header.Get("Accept")
		return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader("{}"))}, nil
	})
	if _, err := n.Wanted(t.Context()); err != nil || !strings.Contains(accept, "as=PartialObjectMetadata") {
		t.Errorf("Wanted = %v with Accept %q; want the metadata only", err, accept)
	}
}

// TestReadsOfLabel checks that a run reads the newest label, and that the reads while a fetcher watches the driver may
// come from the API server's cache.
func TestReadsOfLabel(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var queries []string
		n := (&oneNode{}).fetcher()
		n.api.http.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
			queries = append(queries, r.URL.RawQuery)
			o := &oneNode{}
			if len(queries) > 2 {
				o.node.Metadata.Labels = map[string]string{LabelWanted: "R580"}
			}
			return o.RoundTrip(r)
		})
		_, err := n.Wanted(t.Context())
		changed := n.AwaitLabel(t.Context())
		wish, again := n.Wanted(t.Context())
		const cached = "resourceVersion=0"
		if got := strings.Join(queries, ","); errors.Join(err, again) != nil || !changed || wish != "R580" ||
			got != ","+cached+","+cached+"," {
			t.Errorf("Wanted = %v, AwaitLabel = %t, Wanted = %q, %v with the queries %q; want R580, and %s in those of "+
				"AwaitLabel", err, changed, wish, again, got, cached)
		}
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
