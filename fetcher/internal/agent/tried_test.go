package agent_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// TestTried checks the reports that a node sends to the server: one for each attempt to load an artifact.
func TestTried(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	older, newer := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, newVersion)
	po, pn := sample.Publish(t, ref, key, older), sample.Publish(t, ref, key, newer)
	n := newNode(t, older, 1, key)
	const id = "0123456789abcdef0123456789abcdef"
	if err := os.WriteFile(filepath.Join(n.root, "etc/machine-id"), []byte(id+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var all []api.NodeReport
	n.parts.Tried = func(r api.NodeReport) { all = append(all, r) }
	n.kernel.refuse["nvidia "+newVersion] = syscall.ENODEV
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err == nil {
		t.Error("Run(refused driver) = nil; want an error")
	}
	if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
		t.Fatal(err)
	}
	if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil { // this run loads nothing
		t.Fatal(err)
	}
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err == nil {
		t.Error("Run(refused driver) = nil; want an error")
	}
	want := []struct {
		outcome api.Outcome
		digest  string
		blamed  bool
	}{{api.NotLoad, pn.Digest, true}, {api.Loaded, po.Digest, false}, {api.FellBack, pn.Digest, true}}
	if len(all) != len(want) {
		t.Fatalf("told %+v; want %d reports", all, len(want))
	}
	for i, w := range want {
		r := all[i]
		kind, err := fault.Parse(r.Class)
		if r.Outcome != w.outcome || r.Digest != w.digest || r.BuildID != buildA || r.Board != "lakitu" ||
			w.blamed != (r.Message != "" && err == nil && kind == fault.Unusable) || strings.Contains(r.Message, "\n") {
			t.Errorf("report %d = %+v; want %+v", i, r, w)
		}
		if r.Node != all[0].Node || !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(r.Node) ||
			strings.Contains(r.Node, id) {
			t.Errorf("report %d is of node %q; want a hash that is the same each time", i, r.Node)
		}
	}
}
