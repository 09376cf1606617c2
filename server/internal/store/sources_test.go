package store_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/server/internal/store"
)

// testGPUsAndGKE stores a kernel again without GPUs and GKE versions; the stored ones must stay. It also searches for
// kernels by GKE version.
func testGPUsAndGKE(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	full := api.Kernel{Kernel: kernelOf(id), SeenAt: noon, GPUs: map[string]api.GPUDrivers{
		"NVIDIA_L4": {Default: "535.261.03", Latest: "570.172.08", Branches: map[string]string{"R570": "570.172.08"}}}}
	full.Commit = strings.Repeat("c", 40)
	put := func(k api.Kernel) {
		t.Helper()
		if err := s.Write(ctx, func(tx *store.Tx) error { return tx.PutKernel(ctx, k) }); err != nil {
			t.Fatal(err)
		}
	}
	gke := func(buildID string, versions ...string) {
		t.Helper()
		err := s.Write(ctx, func(tx *store.Tx) error { return tx.PutGKE(ctx, buildID, "lakitu", versions) })
		if err != nil {
			t.Fatal(err)
		}
	}
	put(full)
	if _, err := s.KernelCells(ctx, id, "lakitu"); err != nil { // fills the cache
		t.Fatal(err)
	}
	gke(id, "1.33.5-gke.1080000", "1.32.9-gke.100")
	gke("1.1.1", "1.33.5-gke.1080000") // the catalogue does not have this kernel
	put(api.Kernel{Kernel: kernelOf(id), SeenAt: noon})
	want := full
	want.FirstSeenAt, want.GKE = noon, []string{"1.33.5-gke.1080000", "1.32.9-gke.100"}
	cells, err := s.KernelCells(ctx, id, "lakitu")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, cells.Kernel); diff != "" {
		t.Errorf("the kernel (-want +got):\n%s", diff)
	}
	for gke, found := range map[string]bool{
		"1.33.5-gke.1080000": true, "1.33.5": true, "1.33": true, "1.32.9-gke.100": true,
		"1.33.5-gke.108000": false, "1.3": false, "1.33.50": false, "3.5-gke.1080000": false, "1.32.9-gke.1000": false,
	} {
		all, _, err := s.Kernels(ctx, store.KernelFilter{GKE: gke, BuildID: id}, page)
		if err != nil || (len(all) == 1) != found {
			t.Errorf("Kernels(GKE %s) = %d kernels, %v; want it found: %t", gke, len(all), err, found)
		}
	}
	if _, known, err := s.Kernel(ctx, "1.1.1", "lakitu"); known || err != nil {
		t.Errorf("Kernel(1.1.1) = known %t, %v; want it not known", known, err)
	}
	gke(id)
	if k, _, err := s.Kernel(ctx, id, "lakitu"); err != nil || len(k.GKE) != 0 {
		t.Errorf("GKE versions = %v, %v; want none any more", k.GKE, err)
	}
}
