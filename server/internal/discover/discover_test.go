package discover_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/discover"
	"github.com/prebake/prebake/server/internal/store"
)

// notes stands in for the catalogue. It keeps what discovery records.
type notes struct {
	known   []api.Kernel
	mu      sync.Mutex
	kernels []api.Kernel
	drivers []string
	gke     map[string][]string
}

func (n *notes) Kernels(context.Context, store.KernelFilter, store.Page) ([]api.Kernel, string, error) {
	return n.known, "", nil
}

func (n *notes) RecordKernel(_ context.Context, k api.Kernel) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.kernels = append(n.kernels, k)
	return nil
}

func (n *notes) RecordDrivers(_ context.Context, all []api.DriverRelease) error {
	for _, d := range all {
		n.drivers = append(n.drivers, d.Version)
	}
	return nil
}

func (n *notes) SawGKE(_ context.Context, versions map[string][]string) error {
	n.gke = versions
	return nil
}

func lay(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return "file://" + dir
}

func TestLook(t *testing.T) {
	t.Parallel()
	commit := strings.Repeat("a", 40)
	kernels := lay(t, map[string]string{
		"17800.0.47/lakitu/kernel_commit":       commit + "\n",
		"17800.0.47/lakitu/gpu_default_version": "535.261.03\n",
		"17800.0.47/lakitu/gpu_latest_version":  "535.309.01\n",
		// The list has the form of gpu_driver_versions.proto of cos/tools. Only one type of GPU has 580.95.05.
		"17800.0.47/lakitu/gpu_driver_versions.textproto": `
gpu_driver_version_info { gpu_device { gpu_type: "OTHERS" } supported_driver_versions { label: "DEFAULT" version: "535.104.05" } }
gpu_driver_version_info { gpu_device { gpu_type: "NVIDIA_H100_80GB" }
  supported_driver_versions { label: "DEFAULT" version: "535.309.01" }
  supported_driver_versions { label: "R580" version: "580.95.05" } }
`,
		"17800.0.50/lakitu/kernel_commit": commit + "\n",
		"17800.0.9/lakitu/kernel_commit":  commit + "\n",
		"17800.0.51/lakitu/kernel_commit": "no commit\n",
		"latest/lakitu/kernel_commit":     commit + "\n",
	})
	drivers := lay(t, map[string]string{
		"NVIDIA-Linux-x86_64-535.261.03.run":               "x",
		"sha256/NVIDIA-Linux-x86_64-535.261.03.run.sha256": "x",
		"NVIDIA-Linux-aarch64-535.261.03.run":              "x",
		// Google's former buckets have such paths.
		"tesla/535.309.01/NVIDIA-Linux-x86_64-535.309.01.run":      "x",
		"NVIDIA-Linux-x86_64-.run":                                 "x",
		"tesla/535.261.03/NVIDIA-Linux-x86_64-535.261.03-grid.run": "x",
		"GRID/NVIDIA-Linux-x86_64-535.54.03-grid.run":              "x", // builders look for no runfiles in this folder
		"NVIDIA-Linux-x86_64-535.261.03-open.run":                  "x", // a version must not end with a flavour
		"README": "x",
	})
	n := &notes{}
	counts, err := discover.Scan(t.Context(), discover.Config{Catalogue: n, Sources: []discover.Source{
		discover.Kernels{URL: kernels, PerMilestone: 3}, discover.Drivers{URL: drivers}}})
	if counts["kernels"] != 2 || counts["drivers"] != 3 || !fault.Is(err, fault.Unsupported) {
		t.Errorf("Scan() = %v, %v; want 2 kernels, 3 drivers and trouble with one commit", counts, err)
	}
	slices.SortFunc(n.kernels, func(a, b api.Kernel) int { return strings.Compare(a.BuildID, b.BuildID) })
	kernel := func(id string) target.Kernel {
		return target.Kernel{BuildID: id, Board: "lakitu", Milestone: 109, Commit: commit, Arch: target.AMD64}
	}
	want := []api.Kernel{
		{Kernel: kernel("17800.0.47"), Default: "535.261.03", Latest: "535.309.01",
			Branches: map[string]string{"R535": "535.309.01", "R580": "580.95.05"},
			GPUs: map[string]api.GPUDrivers{"NVIDIA_H100_80GB": {Default: "535.309.01",
				Branches: map[string]string{"R535": "535.309.01", "R580": "580.95.05"}}}},
		{Kernel: kernel("17800.0.50")},
	}
	if diff := cmp.Diff(want, n.kernels); diff != "" {
		t.Errorf("kernels (-want +got):\n%s", diff)
	}
	slices.Sort(n.drivers)
	if diff := cmp.Diff([]string{"535.261.03", "535.261.03-grid", "535.309.01"}, n.drivers); diff != "" {
		t.Errorf("drivers (-want +got):\n%s", diff)
	}
}

func TestTroubleIsNotFatal(t *testing.T) {
	t.Parallel()
	n := &notes{}
	drivers := lay(t, map[string]string{"NVIDIA-Linux-x86_64-535.261.03.run": "x"})
	c := discover.Config{Catalogue: n, Log: slog.New(slog.DiscardHandler), Sources: []discover.Source{
		discover.Kernels{URL: "file:///does/not/exist"}, &discover.GKE{Map: "file:///does/not/exist"},
		discover.Drivers{URL: drivers}}}
	counts, err := discover.Scan(t.Context(), c)
	if diff := cmp.Diff(map[string]int{"kernels": 0, "gke": 0, "drivers": 1}, counts); diff != "" || err == nil {
		t.Errorf("Scan() = %v, %v; want the driver and the trouble", counts, err)
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := discover.Run(ctx, c); err != nil {
		t.Errorf("Run() = %v; want nil", err)
	}
}

// TestEachMilestoneIsFollowed checks that discovery reads the COS builds of an LTS milestone even if newer milestones
// have many more. Of the known COS builds, it must read again only the newest ones of each milestone.
func TestEachMilestoneIsFollowed(t *testing.T) {
	t.Parallel()
	commit := strings.Repeat("a", 40) + "\n"
	files := map[string]string{"17800.66.78/lakitu/kernel_commit": commit}
	for n := range 420 {
		files[fmt.Sprintf("19999.0.%d/lakitu/kernel_commit", n)] = commit
	}
	mirror := lay(t, files)
	n := &notes{}
	c := discover.Kernels{URL: mirror, PerMilestone: 10}
	if k, err := c.Look(t.Context(), n); k != 11 || err != nil {
		t.Fatalf("Look() = %d kernels, %v; want 10 of the newest milestone and one of the LTS milestone", k, err)
	}
	if !slices.ContainsFunc(n.kernels, func(k api.Kernel) bool { return k.BuildID == "17800.66.78" }) {
		t.Error("the LTS build is not known")
	}
	for _, k := range n.kernels {
		k.SeenAt = time.Now()
		n.known = append(n.known, k)
	}
	n.kernels = nil
	if k, err := c.Look(t.Context(), n); k != 4 || err != nil {
		t.Errorf("the second Look() read %d kernels, %v; want three of one milestone and one of the other", k, err)
	}
}

// TestLateBoard checks that discovery finds the second board of a COS build, although it has recorded that build with
// the first board alone.
func TestLateBoard(t *testing.T) {
	t.Parallel()
	commit := strings.Repeat("a", 40)
	files := map[string]string{}
	for n := range 6 {
		files[fmt.Sprintf("17800.0.%d/lakitu/kernel_commit", n)] = commit + "\n"
	}
	for _, id := range []string{"17800.0.5", "17800.0.2", "17800.0.1"} {
		files[id+"/lakitu-arm64/kernel_commit"] = commit + "\n"
	}
	n := &notes{}
	now := time.Now()
	for id := range 6 {
		first := now.Add(-48 * time.Hour)
		if id == 2 {
			first = now.Add(-time.Hour)
		}
		n.known = append(n.known, api.Kernel{SeenAt: now, FirstSeenAt: first, Kernel: target.Kernel{
			BuildID: fmt.Sprintf("17800.0.%d", id), Board: "lakitu", Commit: commit, Arch: target.AMD64}})
	}
	k := discover.Kernels{URL: lay(t, files)}
	if _, err := k.Look(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	got := map[string]int{}
	for _, k := range n.kernels {
		got[k.String()]++
	}
	want := map[string]int{"17800.0.5/lakitu": 1, "17800.0.4/lakitu": 1, "17800.0.3/lakitu": 1,
		"17800.0.5/lakitu-arm64": 1, // one of the newest three
		"17800.0.2/lakitu-arm64": 1} // recorded for the first time an hour ago
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Look() read kernels (-want +got):\n%s", diff)
	}
}

func TestMirrorLooksUpOneBuild(t *testing.T) {
	t.Parallel()
	m := discover.Mirror{URL: lay(t, map[string]string{
		"17800.0.47/lakitu/kernel_commit":       strings.Repeat("a", 40) + "\n",
		"17800.0.47/lakitu-arm64/kernel_commit": strings.Repeat("b", 40) + "\n",
	})}
	all, err := m.Build(t.Context(), "17800.0.47")
	if err != nil || len(all) != 2 || all[1].Commit != strings.Repeat("b", 40) {
		t.Errorf("Build() = %+v, %v; want both boards", all, err)
	}
	if _, err := m.Build(t.Context(), "17800.0.48"); !fault.Is(err, fault.InputMissing) {
		t.Errorf("Build(absent) = %v; want input-missing", err)
	}
}
