package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// TestKeepFailure checks which failures of a single build are stored, so that a wish list does not try the cell again.
// Only a failure that the same inputs would cause again may be stored.
func TestKeepFailure(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"cos/1.0.1/lakitu/kernel-headers.tgz.md5":                  "aa\n",
		"cos/1.0.1/lakitu/toolchain.tar.xz.md5":                    "bb\n",
		"cos/1.0.1/lakitu/toolchain_env":                           "CC=x\n",
		"drivers/sha256/NVIDIA-Linux-x86_64-535.261.03.run.sha256": "cc\n",
	} {
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	kernel, err := target.ParseKernel("1.0.1", "lakitu")
	if err != nil {
		t.Fatal(err)
	}
	driver := target.Driver{Version: "535.261.03", Flavour: target.Open}
	apiBreak := fault.New(fault.APIBreak, "x.c:1: error", "newer")
	source, compile := timeline.Phase{Name: "source"}, timeline.Phase{Name: "compile"}
	for name, row := range map[string]struct {
		err     error
		phases  []timeline.Phase
		renewal bool
		kept    bool
	}{
		"API break": {apiBreak, []timeline.Phase{source, compile}, false, true},
		// What was built before is tried again after some time.
		"API break of a published artifact": {apiBreak, []timeline.Phase{source, compile}, true, false},
		"in the load test": {apiBreak, []timeline.Phase{source, compile, {Name: "load test", Failed: true}}, false,
			false},
		"before inputs came": {apiBreak, []timeline.Phase{source}, false, false},
		"something that may pass": {fault.New(fault.Transient, "connection reset", ""), []timeline.Phase{source, compile},
			false, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cache, err := cas.Open(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = cache.Close() })
			cfg := pipeline.Config{KernelMirror: "file://" + dir + "/cos", DriverMirror: "file://" + dir + "/drivers",
				Cache: cache}
			res := &pipeline.Result{Kernel: kernel, Driver: driver, Phases: row.phases, Renewal: row.renewal}
			if err := keepFailure(t.Context(), cfg, res, row.err); err != nil {
				t.Fatal(err)
			}
			kernels, err := cosbucket.Open(t.Context(), cfg.KernelMirror)
			if err != nil {
				t.Fatal(err)
			}
			defer kernels.Close()
			drivers, err := cosbucket.Open(t.Context(), cfg.DriverMirror)
			if err != nil {
				t.Fatal(err)
			}
			defer drivers.Close()
			memory, err := failureStore(t.Context(), cfg, kernels, drivers)
			if err != nil {
				t.Fatal(err)
			}
			got, ok := memory.Find(t.Context(), plan.Cell{Kernel: kernel, Driver: driver})
			if ok != row.kept || ok && got.Class != fault.APIBreak {
				t.Errorf("Find = %+v, %t; want %t", got, ok, row.kept)
			}
		})
	}
}
