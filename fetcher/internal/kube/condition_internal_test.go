package kube

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/pkg/target"
)

// TestConditionReason checks status and reason of the node's condition. Operators' alerts select by them.
func TestConditionReason(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	n := &Node{now: func() time.Time { return now }}
	for _, row := range []struct {
		name           string
		state          state
		status, reason string
	}{
		{"ready", state{verdict: gpucheck.Verdict{State: gpucheck.Ready}}, "True", "DriverReady"},
		{"unusable", state{verdict: gpucheck.Verdict{State: gpucheck.Unusable}}, "False", "GPUUnusable"},
		{"no check since", state{verdict: gpucheck.Verdict{State: gpucheck.Ready}, since: now.Add(-time.Hour)}, "Unknown",
			"CheckFailed"},
	} {
		if c := n.condition(row.state, nil); c.Status != row.status || c.Reason != row.reason {
			t.Errorf("%s: condition = %s, %s; want %s, %s", row.name, c.Status, c.Reason, row.status, row.reason)
		}
	}
}

// TestConditionOfReadyDriver checks the message of the condition if the driver is ready. The message must contain what
// the operator should know, such as that a GPU was reset.
func TestConditionOfReadyDriver(t *testing.T) {
	t.Parallel()
	n := &Node{now: time.Now}
	for reason, want := range map[string]string{"": "driver 1.2-open, 2 of 2 GPUs usable",
		"a GPU was reset": "driver 1.2-open, 2 of 2 GPUs usable; a GPU was reset"} {
		v := gpucheck.Verdict{State: gpucheck.Ready, Reason: reason, PCIGPUs: 2, UsableGPUs: 2,
			Driver: target.Driver{Version: "1.2", Flavour: target.Open}}
		if c := n.condition(state{verdict: v}, nil); c.Status != "True" || c.Message != want {
			t.Errorf("condition with reason %q = %s, %q; want True, %q", reason, c.Status, c.Message, want)
		}
	}
}

// apiServer stands in for the API server. It answers all calls about a node, and records the reasons of the conditions.
type apiServer struct{ reasons []string }

func (a *apiServer) RoundTrip(r *http.Request) (*http.Response, error) {
	if strings.HasSuffix(r.URL.Path, "/status") {
		var in struct {
			Status struct{ Conditions []condition }
		}
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			return nil, err
		}
		a.reasons = append(a.reasons, in.Status.Conditions[0].Reason)
	}
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"application/json"}},
		Body: io.NopCloser(strings.NewReader("{}"))}, nil
}

// TestVerdictsExpire checks that the cluster learns of a check that hangs, although the reporter then gets no new
// verdict. Without [Node.Watch], a verdict stays valid.
func TestVerdictsExpire(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		age  time.Duration
		want string
	}{{0, "DriverReady"}, {6 * time.Minute, "CheckFailed"}} {
		synctest.Test(t, func(t *testing.T) {
			server := &apiServer{}
			n := &Node{name: "gpu-1", api: &client{base: "https://api", http: &http.Client{Transport: server}},
				log: slog.New(slog.DiscardHandler), now: time.Now, changed: make(chan struct{}, 1)}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- n.Run(ctx) }()
			n.Watch(row.age)
			n.Report(gpucheck.Verdict{State: gpucheck.Ready})
			time.Sleep(8 * time.Minute)
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
			if len(server.reasons) == 0 || server.reasons[len(server.reasons)-1] != row.want {
				t.Errorf("age %v: the cluster got %v; want %s at last", row.age, server.reasons, row.want)
			}
		})
	}
}
