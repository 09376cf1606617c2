package pipeline_test

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/timeline"
)

// TestCompiling lets only one cell compile at a time. A second cell must wait until the first compile ends, even if it
// ends with an error.
func TestCompiling(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	f.kernel(t, "17800.0.9", headerFiles())
	f.driver(t, driverFiles())
	cfg := f.config(t, emptyCache(t))
	cfg.Compiling = semaphore.NewWeighted(1)
	if err := cfg.Compiling.Acquire(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	type outcome struct {
		res *pipeline.Result
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		res, _, err := build(t, cfg, request("17800.0.9"))
		done <- outcome{res, err}
	}()
	select {
	case got := <-done:
		t.Fatalf("the cell did not wait for the other compile: %v", got.err)
	case <-time.After(2 * time.Second):
	}
	cfg.Compiling.Release(1)
	got := <-done
	if got.err != nil || !slices.Contains(phases(got.res), "compile") {
		t.Fatalf("after the wait: %v, phases %v", got.err, phases(got.res))
	}
	if !cfg.Compiling.TryAcquire(1) {
		t.Fatal("after the compile no other cell can begin")
	}
	// A cell whose context ends must stop waiting.
	cfg.Cache, cfg.Destinations = emptyCache(t), []string{"oci:" + filepath.Join(t.TempDir(), "another")}
	ctx, stop := context.WithTimeoutCause(t.Context(), 3*time.Second, errors.New("told to stop"))
	defer stop()
	if _, err := pipeline.Run(ctx, cfg, request("17800.0.9"), io.Discard, &timeline.Run{}); err == nil {
		t.Error("the cell compiled while another compile was running")
	}
	cfg.Compiling.Release(1)

	f.driver(t, map[string]string{"kernel-open/Kbuild": "obj-m += nvidia.o\n", "kernel-open/nvidia.c": "#error no\n"})
	cfg.Cache = emptyCache(t)
	if _, _, err := build(t, cfg, request("17800.0.9")); err == nil {
		t.Error("a driver that does not compile was built")
	}
	if !cfg.Compiling.TryAcquire(1) {
		t.Error("after a failed compile no other cell can begin")
	}
}
