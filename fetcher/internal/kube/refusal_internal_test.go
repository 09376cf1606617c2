package kube

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/pkg/fault"
)

// oneNode stands in for an API server with one node object. refuse has the status with which it refuses a step.
type oneNode struct {
	refuse map[string]int
	node   node
	steps  []string
}

func (o *oneNode) RoundTrip(r *http.Request) (*http.Response, error) {
	var in node
	step := "read"
	if r.Body != nil {
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			return nil, err
		}
		switch {
		case r.Method == http.MethodPost:
			step = "event"
		case strings.HasSuffix(r.URL.Path, "/status"):
			step = "condition"
		case in.Spec.Taints != nil:
			step = "taint"
		default:
			step = "labels"
		}
		o.steps = append(o.steps, step)
	}
	status := http.StatusOK
	switch code := o.refuse[step]; {
	case code != 0:
		status = code
	case step == "condition":
		o.node.Status.Conditions = in.Status.Conditions
	case step == "taint" && in.Metadata.ResourceVersion != o.node.Metadata.ResourceVersion:
		status = http.StatusConflict
	case step == "taint":
		o.node.Spec.Taints = in.Spec.Taints
	}
	raw, err := json.Marshal(o.node)
	return &http.Response{StatusCode: status, Body: io.NopCloser(strings.NewReader(string(raw)))}, err
}

func (o *oneNode) fetcher() *Node {
	return &Node{name: "gpu-1", taint: "startup", api: &client{base: "https://api", http: &http.Client{Transport: o}},
		log: slog.New(slog.DiscardHandler), now: time.Now, changed: make(chan struct{}, 1)}
}

// TestRefusals checks which steps of a report the reporter still does if the cluster refuses one of them.
func TestRefusals(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		refuse map[string]int
		text   string // part of the error; "" means no error
		steps  string
		taint  bool // whether the taint is still there
	}{
		{"nothing", nil, "", "labels taint condition event", false},
		{"the condition, by RBAC", map[string]int{"condition": 403}, "", "labels taint condition event", false},
		{"the condition, by a policy", map[string]int{"condition": 422}, "HTTP 422", "labels taint condition", false},
		{"the Event", map[string]int{"event": 403}, "", "labels taint condition event", false},
		{"the taint, by a policy", map[string]int{"taint": 422}, "the cluster refuses", "labels taint condition event", true},
		{"the taint, by a change", map[string]int{"taint": 409}, "changed meanwhile", "labels taint condition event", true},
	} {
		o := &oneNode{refuse: row.refuse}
		o.node.Metadata.ResourceVersion = "7"
		o.node.Spec.Taints = []map[string]any{{"key": "startup", "timeAdded": "x"}, {"key": "nvidia.com/gpu"}}
		n := o.fetcher()
		n.Report(gpucheck.Verdict{State: gpucheck.Ready})
		err := n.write(t.Context())
		if (err != nil) != (row.text != "") || err != nil && !strings.Contains(err.Error(), row.text) ||
			strings.Contains(row.text, "refuses") != (fault.Hint(err) != "") {
			t.Errorf("%s: write = %v (hint %q); want %q", row.name, err, fault.Hint(err), row.text)
		}
		if got := strings.Join(o.steps, " "); got != row.steps || (len(o.node.Spec.Taints) == 2) != row.taint {
			t.Errorf("%s: steps %s, taints %v; want %s, startup taint %v", row.name, got, o.node.Spec.Taints, row.steps,
				row.taint)
		}
	}
}

// TestEventsOfRestarts checks which Events a reporter writes after a restart. It must write no Event about a state that
// the node showed before, even if its first reports say less. If an Event could not be written, the reporter must write
// it later.
func TestEventsOfRestarts(t *testing.T) {
	t.Parallel()
	o := &oneNode{refuse: map[string]int{"event": 500}}
	events := func(n *Node, reason string) int {
		o.steps = nil
		n.Report(gpucheck.Verdict{State: gpucheck.Absent, Reason: reason})
		_ = n.write(t.Context()) // the number of Events shows whether it worked
		return len(slices.DeleteFunc(o.steps, func(s string) bool { return s != "event" }))
	}
	first := o.fetcher()
	if tries := events(first, "no artifact") + events(first, "no artifact"); tries != 2 {
		t.Errorf("%d tries to write an Event; want 2, because the first failed", tries)
	}
	o.refuse = nil
	second, third := o.fetcher(), o.fetcher()
	for i, row := range []struct {
		n      *Node
		reason string
		want   int
	}{
		{first, "no artifact", 1}, {first, "no artifact", 0},
		{second, "no driver", 0}, {second, "no artifact", 0}, {second, "the registry is away", 1},
		{third, "no driver", 0}, {third, "the registry is away", 0}, {third, "no artifact", 1},
	} {
		if got := events(row.n, row.reason); got != row.want {
			t.Errorf("report %d, %q: %d Events; want %d", i, row.reason, got, row.want)
		}
	}
}
