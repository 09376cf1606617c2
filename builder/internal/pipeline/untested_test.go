package pipeline_test

import (
	"bytes"
	"compress/gzip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/fault"
)

// TestNotReusedUntested has a COS build with a boot image of its own. Before a published artifact is reused for it, the
// artifact must pass a load test on this kernel.
func TestNotReusedUntested(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	must(t, f.config(t, emptyCache(t)), request("17800.0.9"))
	f.kernel(t, "17800.1.9", headerFiles())
	var boot bytes.Buffer
	tarOf(t, map[string]string{"vmlinuz": "none"}, gzip.NewWriter(&boot))
	f.putChecked(t, "cos/17800.1.9/lakitu/prebake-boot.tgz", boot.Bytes())
	cfg := f.config(t, emptyCache(t))
	cfg.GuestInit = filepath.Join(t.TempDir(), "none") // without this program, no virtual machine can start
	res, _, err := build(t, cfg, request("17800.1.9"))
	if err == nil || res.Reused {
		t.Errorf("Run = %+v, %v; want the load test's failure", res, err)
	}
	if diff := cmp.Diff(whole[:5], phases(res)); diff != "" {
		t.Errorf("phases (-want +got):\n%s", diff)
	}
	cfg.LoadTest = pipeline.LoadTestOff
	if res := must(t, cfg, request("17800.1.9")); !res.Reused {
		t.Errorf("with the load test off: %+v; want it reused", res)
	}
}

// TestLackingModules has a driver that needs a module of the kernel, which no bucket has. The build must fail only in
// the mode LoadTestRequire.
func TestLackingModules(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	tree := headerFiles()
	tree[headers+"Module.symvers"] += "0x00000000\tdrm_open\tdrivers/gpu/drm/drm\tEXPORT_SYMBOL\t\n"
	f.kernel(t, "17800.0.9", tree)
	files := driverFiles()
	files["kernel-open/nv.c"] = strings.Replace(files["kernel-open/nv.c"], "depends=", "depends=drm", 1)
	f.driver(t, files)
	var boot bytes.Buffer
	tarOf(t, map[string]string{"vmlinuz": "no kernel"}, gzip.NewWriter(&boot))
	f.putChecked(t, "cos/17800.0.9/lakitu/prebake-boot.tgz", boot.Bytes())
	cfg := f.config(t, emptyCache(t))
	cfg.GuestInit, cfg.NVMLProbe = "none", "none" // the load test ends before it starts these programs
	res := must(t, cfg, request("17800.0.9"))
	var note string
	for _, p := range res.Phases {
		if p.Name == "load test" {
			note = p.Note
		}
	}
	if res.LoadTest != nil || !strings.Contains(note, "static checks only") ||
		!strings.Contains(note, "nvidia needs drm") {
		t.Errorf("load test %+v, %q; want static checks only, and why", res.LoadTest, note)
	}
	cfg.LoadTest = pipeline.LoadTestRequire
	if _, _, err := build(t, cfg, request("17800.0.9")); !fault.Is(err, fault.InputMissing) ||
		!strings.Contains(err.Error(), "nvidia needs drm") {
		t.Errorf("with a load test required: %v; want it refused", err)
	}
}
