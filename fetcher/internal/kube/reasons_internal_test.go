package kube

import (
	"os"
	"regexp"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
)

// TestReasonsPage checks that the table in docs/how-to/troubleshooting.md has each state and reason that a node object
// can show, and no other.
func TestReasonsPage(t *testing.T) {
	t.Parallel()
	n := &Node{now: time.Now}
	shown := func(s state) [2]string {
		label := s.metadata()["labels"].(map[string]any)[labelState].(string) //nolint:forcetypeassert // always a string
		return [2]string{label, n.condition(s, nil).Reason}
	}
	source, err := os.ReadFile("../gpucheck/gpucheck.go")
	if err != nil {
		t.Fatal(err)
	}
	want := map[[2]string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^\t\w+ +State = "(.*?)"`).FindAllSubmatch(source, -1) {
		want[shown(state{verdict: gpucheck.Verdict{State: gpucheck.State(m[1])}})] = true
	}
	if len(want) != len(reasons) {
		t.Fatalf("gpucheck has %d states, and there are %d reasons for them", len(want), len(reasons))
	}
	ready := gpucheck.Verdict{State: gpucheck.Ready}
	want[shown(state{verdict: ready, since: time.Unix(1, 0)})] = true
	hung := shown(state{verdict: ready, hung: time.Unix(1, 0)})
	if hung[0] != string(gpucheck.Ready) {
		t.Errorf("state of a ready driver whose check hangs = %q; want ready", hung[0])
	}
	want[[2]string{"as before", hung[1]}] = true

	text, err := os.ReadFile("../../../docs/how-to/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	got := map[[2]string]bool{}
	row := regexp.MustCompile("(?m)^\\| `?([a-z -]+?)`? \\| `([A-Z][A-Za-z]+)` \\| ")
	for _, m := range row.FindAllSubmatch(text, -1) {
		pair := [2]string{string(m[1]), string(m[2])}
		if got[pair] {
			t.Errorf("the table has two rows for %v", pair)
		}
		got[pair] = true
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("states and reasons in docs/how-to/troubleshooting.md (-want +got):\n%s", diff)
	}
}
