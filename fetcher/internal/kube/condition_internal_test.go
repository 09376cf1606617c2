package kube

import (
	"context"
	"encoding/json"
	"errors"
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
		{"a check hangs", state{verdict: gpucheck.Verdict{State: gpucheck.Ready}, since: now.Add(-time.Hour),
			hung: now.Add(-time.Hour)}, "Unknown", "CheckHangs"},
	} {
		if c := n.condition(row.state, nil); c.Status != row.status || c.Reason != row.reason {
			t.Errorf("%s: condition = %s, %s; want %s, %s", row.name, c.Status, c.Reason, row.status, row.reason)
		}
	}
}

// TestReasonWithoutPorts checks that two runs with the same network error give the node the same reasons, although the
// node's port differs. A changed reason costs an Event.
func TestReasonWithoutPorts(t *testing.T) {
	t.Parallel()
	n := &Node{now: time.Now, changed: make(chan struct{}, 1)}
	var seen []state
	for _, port := range []string{"43512", "51000"} {
		text := "lookup farm: read udp 10.4.1.7:" + port + "->10.8.0.10:53: i/o timeout"
		n.Pending(errors.New(text))
		n.Report(gpucheck.Verdict{State: gpucheck.Unusable, Reason: "transient: " + text})
		seen = append(seen, state{verdict: n.verdict, pending: n.pending})
	}
	if !seen[0].same(seen[1]) || !strings.Contains(seen[0].pending, "10.4.1.7->10.8.0.10:53") {
		t.Errorf("reasons of two runs are %q, %q and %q, %q; want no difference", seen[0].pending, seen[0].verdict.Reason,
			seen[1].pending, seen[1].verdict.Reason)
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

// apiServer answers all calls about a node. It stores the reasons of the conditions that it received, and the labels
// with the driver's state.
type apiServer struct{ reasons, labels []string }

func (a *apiServer) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method == http.MethodPatch && !strings.HasSuffix(r.URL.Path, "/status") {
		var in struct {
			Metadata struct{ Labels map[string]string }
		}
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			return nil, err
		}
		a.labels = append(a.labels, in.Metadata.Labels[labelState])
	}
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

// TestHangShows checks that the cluster learns of a check that hangs some seconds after the first minute, and of the
// end of the hang. The label must stay until the verdict expires: a DaemonSet that selects nodes by it would lose its
// pods for one slow check. A check that is as slow as the one before it does not change the condition once more.
func TestHangShows(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		server := &apiServer{}
		n := &Node{name: "gpu-1", api: &client{base: "https://api", http: &http.Client{Transport: server}},
			log: slog.New(slog.DiscardHandler), now: time.Now, changed: make(chan struct{}, 1)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- n.Run(ctx) }()
		n.Watch(6 * time.Minute)
		ready := gpucheck.Verdict{State: gpucheck.Ready}
		n.Report(ready)
		shows := func(after time.Duration, reasons, label string) {
			t.Helper()
			time.Sleep(after)
			synctest.Wait()
			got := strings.Join(server.reasons, " ")
			if last := server.labels[len(server.labels)-1]; got != reasons || last != label {
				t.Errorf("after %v: reasons %s, label %s; want %s, %s", after, got, last, reasons, label)
			}
		}
		shows(time.Minute, "DriverReady", "ready")
		n.CheckStarted()
		shows(time.Minute, "DriverReady", "ready")
		shows(ageCheck, "DriverReady CheckHangs", "ready")
		n.Report(ready)
		shows(time.Minute, "DriverReady CheckHangs DriverReady", "ready")
		n.CheckStarted() // the check before it took 70 s
		shows(70*time.Second, "DriverReady CheckHangs DriverReady", "ready")
		n.Report(ready)
		n.CheckStarted()
		shows(130*time.Second, "DriverReady CheckHangs DriverReady CheckHangs", "ready")
		shows(5*time.Minute, "DriverReady CheckHangs DriverReady CheckHangs CheckHangs", "unknown")
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
