package mirror

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/target"
)

// TestNext has the builder compile a driver of another branch for a kernel of a
// newer series, and load it. The flavour is the one that knows this kernel: the open
// one calls pci_resize_resource, which 6.12 has changed since. Packages and a compile take minutes, so the test runs
// only where PREBAKE_NEXT_CACHE names the cache folder of `mirror` (make
// next does).
func TestNext(t *testing.T) {
	cache := os.Getenv("PREBAKE_NEXT_CACHE")
	if cache == "" {
		t.Skip("PREBAKE_NEXT_CACHE is not set: it names the cache folder of `mirror --kernel-series 6.12 --driver-branch R550`; run make next")
	}
	dir := t.TempDir()
	builder := programs(t, target.AMD64)

	mirror := filepath.Join(dir, "mirror")
	var made Result
	builder(&made, "mirror", "--kernel-series", "6.12", "--driver-branch", "R550", "--out", mirror, "--cache", cache, "--output", "json")
	if len(made.Builds) != 1 || len(made.Drivers) != 1 || !slices.Contains(made.Drivers[0].Flavours, target.Open) {
		t.Fatalf("mirror made %+v; want one build, and one driver in both flavours", made)
	}
	kernel, driver := made.Builds[0], made.Drivers[0]
	if !strings.HasPrefix(kernel.Release, "6.12.") || target.Branch(driver.Version) != "R550" {
		t.Errorf("mirror made %s and %s; want 6.12 and R550", kernel.Release, driver.Version)
	}

	key := filepath.Join(dir, "key")
	builder(nil, "keygen", key)
	var done struct {
		Driver   target.Driver
		LoadTest verdict
	}
	builder(&done, "build", "--build-id", kernel.BuildID, "--driver", "R550", "--flavour", "proprietary",
		"--kernel-mirror", "file://"+mirror+"/cos", "--driver-mirror", "file://"+mirror+"/drivers",
		"--cache", filepath.Join(dir, "cache"), "--key", key, "--to", "oci:"+filepath.Join(dir, "out"), "--load-test", "require", "--output", "json")
	v := done.LoadTest
	t.Logf("%s on %s: boot %.1f s, load %.1f s, probe %.1f s, unload %.1f s", &v, v.Machine, v.BootSeconds, v.LoadSeconds, v.ProbeSeconds, v.UnloadSeconds)
	if v.State != stateLoaded || v.NVMLVersion != driver.Version || v.Release != kernel.Release || !v.EmulatedGPU {
		t.Errorf("load test: %s, NVML %q, kernel %q, GPU %t; want loaded, %s, %s, true", &v, v.NVMLVersion, v.Release, v.EmulatedGPU, driver.Version, kernel.Release)
	}
}
