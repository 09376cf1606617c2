package kube_test

import (
	"io"
	"log/slog"
	"net/http"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/kube"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// TestLabelOfNode sets a node's label as an operator does, and reads it as the account of a fetcher. The fetcher itself
// must not be able to write the label.
func TestLabelOfNode(t *testing.T) {
	c := farm(t)
	t.Setenv("KUBERNETES_SERVICE_HOST", c.Host)
	t.Setenv("KUBERNETES_SERVICE_PORT", c.Port)
	dir, token := account(t, c, "gpu-1")
	n, err := kube.New("gpu-1", "", dir, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		set  string // the argument of kubectl label
		want target.Wish
		kind fault.Kind // Internal means no error
	}{
		{"=R580", "R580", fault.Internal},
		{"=default.NVIDIA_H100_80GB", "default@NVIDIA_H100_80GB", fault.Internal},
		{"=default.NVIDIA_RTX_PRO_6000", "default@NVIDIA_RTX_PRO_6000", fault.Internal},
		{"=535.261.03-grid", "535.261.03-grid", fault.Internal},
		{"=newest", "", fault.Usage},
		{"-", "", fault.Internal},
	} {
		if _, err := c.Kubectl("", "label", "node", "gpu-1", "--overwrite", kube.LabelWanted+row.set); err != nil {
			t.Fatal(err)
		}
		got, err := n.Wanted(t.Context())
		if got != row.want || (err == nil) != (row.kind == fault.Internal) || err != nil && !fault.Is(err, row.kind) {
			t.Errorf("label %s: Wanted = %q, %v; want %q, %v", row.set, got, err, row.want, row.kind)
		}
	}
	patch := map[string]any{"metadata": map[string]any{"labels": map[string]any{kube.LabelWanted: "R535"}}}
	if err := c.As(token)(http.MethodPatch, "/api/v1/nodes/gpu-1", patch); err == nil {
		t.Error("a fetcher's account wrote the label; want the call refused")
	}
}
