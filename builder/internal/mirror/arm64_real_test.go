package mirror

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/builder/internal/loadtest"
	"github.com/prebake/prebake/pkg/target"
)

// crossCompiler makes the NVML probe for arm64, which is C in part.
const crossCompiler = "aarch64-linux-gnu-gcc-12"

// TestARM64 has the builder do on this machine what it is for, for another
// kind of machine: a driver is cross-compiled for an Arm kernel, checked,
// loaded in an emulated Arm machine with all its modules, asked, unloaded, and
// published. Packages and a compile take minutes, so the test runs only where
// PREBAKE_ARM64_CACHE names the cache folder of `builder mirror` (make arm64
// does).
func TestARM64(t *testing.T) {
	cache := os.Getenv("PREBAKE_ARM64_CACHE")
	if cache == "" {
		t.Skip("PREBAKE_ARM64_CACHE is not set: it names the cache folder of `builder mirror --arch arm64`; run make arm64")
	}
	dir := t.TempDir()
	builder := programs(t, target.ARM64)

	mirror := filepath.Join(dir, "mirror")
	var made Result
	builder(&made, "mirror", "--arch", "arm64", "--out", mirror, "--cache", cache, "--output", "json")
	if len(made.Builds) != 1 || len(made.Drivers) != 1 {
		t.Fatalf("builder mirror made %+v; want one build and one driver", made)
	}
	kernel, driver := made.Builds[0], made.Drivers[0]

	key := filepath.Join(dir, "key")
	builder(nil, "keygen", key)
	var done struct {
		Kernel   target.Kernel
		Driver   target.Driver
		LoadTest loadtest.Verdict
	}
	builder(&done, "build", "--build-id", kernel.BuildID, "--board", "lakitu-arm64", "--driver", "default", "--flavour", "proprietary",
		"--kernel-mirror", "file://"+mirror+"/cos", "--driver-mirror", "file://"+mirror+"/drivers",
		"--cache", filepath.Join(dir, "cache"), "--key", key, "--to", "oci:"+filepath.Join(dir, "out"), "--load-test", "require", "--output", "json")
	if done.Kernel.Arch != target.ARM64 || done.Driver.Version != driver.Version {
		t.Errorf("builder build made %+v for %+v; want driver %s for arm64", done.Driver, done.Kernel, driver.Version)
	}
	v := done.LoadTest
	t.Logf("%s on %s: boot %.1f s, load %.1f s, probe %.1f s, unload %.1f s", &v, v.Machine, v.BootSeconds, v.LoadSeconds, v.ProbeSeconds, v.UnloadSeconds)
	if v.State != loadtest.Loaded || v.NVMLVersion != driver.Version || v.Release != kernel.Release || !v.EmulatedGPU {
		t.Errorf("load test: %s, NVML %q, kernel %q, GPU %t; want loaded, %s, %s, true", &v, v.NVMLVersion, v.Release, v.EmulatedGPU, driver.Version, kernel.Release)
	}
	// This kernel has DRM: nothing is left out.
	for _, name := range []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm"} {
		i := slices.IndexFunc(v.Modules, func(m loadtest.Module) bool { return m.Name == name })
		if i < 0 || v.Modules[i] != (loadtest.Module{Name: name, Load: loadtest.OK, Unload: loadtest.OK}) {
			t.Errorf("modules = %+v; want %s loaded and unloaded, without a word", v.Modules, name)
		}
	}
}

// programs compiles the builder, and the programs that its load test of an
// architecture needs, into one folder. It returns how to run the builder, whose
// JSON it reads into out.
func programs(t *testing.T, arch target.Arch) func(out any, args ...string) {
	t.Helper()
	bin, suffix, cc := t.TempDir(), "", "gcc"
	if arch != target.AMD64 {
		suffix, cc = "-"+string(arch), crossCompiler
	}
	for _, p := range []struct{ pkg, name, arch, cgo string }{
		{"builder", "builder", string(target.AMD64), "0"},
		{"pkg/vm/guestinit", "guestinit" + suffix, string(arch), "0"},
		{"fetcher/nvmlprobe", "nvmlprobe" + suffix, string(arch), "1"},
	} {
		cmd := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(bin, p.name), "github.com/prebake/prebake/"+p.pkg)
		cmd.Env = append(os.Environ(), "GOARCH="+p.arch, "CC="+cc, "CGO_ENABLED="+p.cgo, "CGO_CFLAGS=-O1 -Wno-deprecated-declarations")
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build %s: %v\n%s", p.name, err, text)
		}
	}
	return func(out any, args ...string) {
		t.Helper()
		start := time.Now()
		cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "builder"), args...)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil {
			t.Fatalf("builder %s: %v\n%s", strings.Join(args, " "), err, &stderr)
		}
		t.Logf("builder %s: %.1f s\n%s", args[0], time.Since(start).Seconds(), &stderr)
		if out == nil {
			return
		}
		if err := json.Unmarshal(stdout.Bytes(), out); err != nil {
			t.Fatalf("builder %s printed %q: %v", args[0], &stdout, err)
		}
	}
}
