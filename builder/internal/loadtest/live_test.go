package loadtest

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/program"
)

// liveConfig returns a Config with a real kernel and a driver for this kernel, or skips the test. PREBAKE_BOOT is a
// boot folder. PREBAKE_DRIVER is a folder with drivers/*.ko, lib64/ and possibly firmware/.
func liveConfig(t *testing.T) Config {
	t.Helper()
	boot, driver := os.Getenv("PREBAKE_BOOT"), os.Getenv("PREBAKE_DRIVER")
	if boot == "" || driver == "" {
		t.Skip("set PREBAKE_BOOT to a boot folder, and PREBAKE_DRIVER to the folder of a driver for its kernel")
	}
	c := Config{Boot: boot, Modules: map[string]string{}, Userspace: driver, Firmware: driver, Timeout: 5 * time.Minute}
	files, err := filepath.Glob(filepath.Join(driver, "drivers", "*.ko"))
	if err != nil || len(files) == 0 {
		t.Fatalf("modules in %s: %v, %v", driver, files, err)
	}
	for _, f := range files {
		c.Modules[strings.TrimSuffix(filepath.Base(f), ".ko")] = f
	}
	m, err := readModule(c.Modules["nvidia"])
	if err != nil {
		t.Fatal(err)
	}
	arch, err := archOf(m.Machine)
	if err != nil {
		t.Fatal(err)
	}
	c.Version, c.Init, c.Probe = m.Version, buildProgram(t, "pkg/vm/guestinit", arch), buildProgram(t, "fetcher/nvmlprobe",
		arch)
	return c
}

// buildProgram compiles a program of this repository for an architecture. It returns the path to give to [Helper].
func buildProgram(t *testing.T, pkg string, arch target.Arch) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), filepath.Base(pkg))
	cgo := strings.HasSuffix(pkg, "nvmlprobe")
	program.Compile(t, Helper(out, arch), pkg, string(arch), cgo)
	return out
}

func TestLiveDriverLoads(t *testing.T) {
	t.Parallel()
	c := liveConfig(t)
	v, err := Run(t.Context(), c, nil)
	if err != nil {
		t.Fatalf("Run() = %v\n%s", err, kernelLog(v))
	}
	t.Logf("boot %.2f s, load %.2f s, probe %.2f s, unload %.2f s, machine %.2f s, %s; modules %+v, warnings %q",
		v.BootSeconds, v.LoadSeconds, v.ProbeSeconds, v.UnloadSeconds, v.Seconds, v.Machine, v.Modules, v.Warnings)
	for line := range strings.Lines(v.KernelLog) {
		if strings.Contains(line, "NVRM") || strings.Contains(line, "nvidia") {
			t.Log(strings.TrimSpace(line))
		}
	}
	if v.State != Loaded || v.NVMLVersion != c.Version {
		t.Errorf("verdict = %s, NVML %q; want loaded, %s", v, v.NVMLVersion, c.Version)
	}
	for _, name := range []string{"nvidia", "nvidia-uvm", "nvidia-modeset"} {
		if m := v.module(name); m.Load != OK || m.Unload != OK {
			t.Errorf("module %+v; want it loaded and unloaded", m)
		}
	}
	for _, name := range []string{"nvidia-drm", "nvidia-peermem"} {
		if m := v.module(name); m.Load != OK && m.Note == "" {
			t.Errorf("module %+v; want it loaded, or a note why not", m)
		}
	}
}

func TestLiveDriverWithoutGPU(t *testing.T) {
	t.Parallel()
	c := liveConfig(t)
	bare := t.TempDir()
	for _, name := range []string{"vmlinuz", "modules"} {
		abs, err := filepath.Abs(filepath.Join(c.Boot, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(abs, filepath.Join(bare, name)); err != nil {
			t.Fatal(err)
		}
	}
	c.Boot = bare
	v, err := Run(t.Context(), c, nil)
	if err != nil {
		t.Fatalf("Run() = %v\n%s", err, kernelLog(v))
	}
	t.Logf("verdict %q; machine %.2f s\n%s", v, v.Seconds, v.KernelLog)
	if v.State != NoDevice {
		t.Errorf("verdict = %s; want %s", v, NoDevice)
	}
}

// TestLiveWrongModule changes the word SMP in nvidia.ko's vermagic, so the kernel must refuse the module. A changed
// release would not do: a kernel with symbol versions (CONFIG_MODVERSIONS) ignores the release in vermagic.
func TestLiveWrongModule(t *testing.T) {
	t.Parallel()
	c := liveConfig(t)
	text, err := os.ReadFile(c.Modules["nvidia"])
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(text, []byte("vermagic="))
	if at < 0 {
		t.Fatal("nvidia.ko has no vermagic")
	}
	magic, _, _ := bytes.Cut(text[at:], []byte{0})
	copy(text[at:], bytes.Replace(magic, []byte(" SMP "), []byte(" XMP "), 1))
	wrong := filepath.Join(t.TempDir(), "nvidia.ko")
	if err := os.WriteFile(wrong, text, 0o600); err != nil {
		t.Fatal(err)
	}
	c.Modules["nvidia"] = wrong
	v, err := Run(t.Context(), c, nil)
	if !fault.Is(err, fault.LoadTestFailed) || v == nil {
		t.Fatalf("Run() = %v, %v; want load-test-failed and a verdict", v, err)
	}
	t.Log(v)
	if diff := cmp.Diff(Rejected, v.State); diff != "" {
		t.Error(diff)
	}
	for _, want := range []string{"load nvidia", "ENOEXEC", "version magic"} {
		if !strings.Contains(v.Reason, want) {
			t.Errorf("reason = %q; want %q in it", v.Reason, want)
		}
	}
}

func kernelLog(v *Verdict) string {
	if v == nil {
		return ""
	}
	return v.KernelLog
}
