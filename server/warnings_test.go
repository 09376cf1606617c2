package main

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
)

func TestWarningsTable(t *testing.T) {
	t.Parallel()
	day := time.Date(2026, 11, 20, 23, 0, 0, 0, time.UTC)
	all := []api.Warning{
		{Kernel: target.Kernel{BuildID: "19000.0.2", Board: "lakitu-arm64"},
			Driver: target.Driver{Version: "535.261.03", Flavour: target.Open},
			Class:  "api-break", Error: "nvidia/nv-pci.c:123:45: error: too few arguments to function 'pci_resize_resource'",
			Since: day},
		{Kernel: target.Kernel{BuildID: "19000.0.2", Board: "lakitu"},
			Driver: target.Driver{Version: "580.1", Flavour: target.Proprietary},
			Class:  "load-test-failed", Error: "x", Since: day},
	}
	var out strings.Builder
	if err := printWarnings(&out, all); err != nil {
		t.Fatal(err)
	}
	want := `KERNEL                  DRIVER             SINCE       WHY
19000.0.2/lakitu-arm64  535.261.03-open    2026-11-20  api-break: nvidia/nv-p...
19000.0.2/lakitu        580.1-proprietary  2026-11-20  load-test-failed: x
`
	if d := cmp.Diff(want, out.String()); d != "" {
		t.Errorf("printWarnings() (-want +got):\n%s", d)
	}
}
