package mirror

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/program"
	"github.com/prebake/prebake/pkg/timeline"
)

// TestARM64 lets the builder on this machine cross-compile, check, load and publish a driver for an Arm kernel. The
// tests of package vm boot this kernel too. In the end, the builder uses a bucket that has a vmlinux but no boot
// archive.
//
// It takes minutes, so it runs only if PREBAKE_ARM64_CACHE is set to the cache folder of `mirror`. `make arm64` sets
// it.
func TestARM64(t *testing.T) {
	cache := os.Getenv("PREBAKE_ARM64_CACHE")
	if cache == "" {
		t.Skip("PREBAKE_ARM64_CACHE is not set to the cache folder of `mirror --arch arm64`; run make arm64")
	}
	dir := t.TempDir()
	builder := compilePrograms(t, target.ARM64)

	mirror := filepath.Join(dir, "mirror")
	var made Result
	builder(&made, "mirror", "--arch", "arm64", "--out", mirror, "--cache", cache, "--output", "json")
	if len(made.Builds) != 1 || len(made.Drivers) != 1 {
		t.Fatalf("mirror made %+v; want one build and one driver", made)
	}
	kernel, driver := made.Builds[0], made.Drivers[0]

	key := filepath.Join(dir, "key")
	builder(nil, "keygen", key)
	build := func(out, loadTest string) (done buildResult) {
		builder(&done, "build", "--build-id", kernel.BuildID, "--board", "lakitu-arm64",
			"--driver", "default", "--flavour", "proprietary",
			"--kernel-mirror", "file://"+mirror+"/cos", "--driver-mirror", "file://"+mirror+"/drivers",
			"--cache", filepath.Join(dir, "cache"), "--key", key, "--to", "oci:"+filepath.Join(dir, out),
			"--load-test", loadTest, "--output", "json")
		return done
	}
	done := build("out", "require")
	if done.Kernel.Arch != target.ARM64 || done.Driver.Version != driver.Version {
		t.Errorf("builder build made %+v for %+v; want driver %s for arm64", done.Driver, done.Kernel, driver.Version)
	}
	v := done.LoadTest
	t.Logf("%s on %s: boot %.1f s, load %.1f s, probe %.1f s, unload %.1f s", &v, v.Machine, v.BootSeconds, v.LoadSeconds,
		v.ProbeSeconds, v.UnloadSeconds)
	if v.State != stateLoaded || v.NVMLVersion != driver.Version || v.Release != kernel.Release || !v.EmulatedGPU {
		t.Errorf("load test: %s, NVML %q, kernel %q, GPU %t; want loaded, %s, %s, true", &v, v.NVMLVersion, v.Release,
			v.EmulatedGPU, driver.Version, kernel.Release)
	}
	// This kernel has DRM, so all four modules are loaded.
	for _, name := range []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm"} {
		i := slices.IndexFunc(v.Modules, func(m testedModule) bool { return m.Name == name })
		if i < 0 || v.Modules[i] != (testedModule{Name: name, Load: loadOK, Unload: loadOK}) {
			t.Errorf("modules = %+v; want %s loaded and unloaded, without a note", v.Modules, name)
		}
	}

	// The tests of package vm cover parts of the emulated machine that the load test does not show.
	bucket, boot := filepath.Join(mirror, "cos", kernel.BuildID, "lakitu-arm64"), filepath.Join(dir, "boot")
	if err := os.Mkdir(boot, 0o755); err != nil {
		t.Fatal(err)
	}
	archived := filepath.Join(bucket, "prebake-boot.tgz")
	if _, err := archive.UnpackFile(t.Context(), archived, boot, archive.Options{}); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "test", "-v", "-count=1", "-parallel=1", "-run", "Boot",
		"github.com/prebake/prebake/pkg/vm")
	cmd.Env = append(os.Environ(), "PREBAKE_BOOT="+boot)
	text, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(text, []byte("--- PASS: TestBootWithoutSerialDriver")) {
		t.Errorf("tests of package vm: %v\n%s", err, text)
	}

	// COS's buckets have only vmlinux to boot from, so the test removes the boot archive.
	image, err := os.ReadFile(filepath.Join(boot, "vmlinuz"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{archived, archived + ".md5"} {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	if err := publishText(filepath.Join(bucket, "vmlinux"), string(wrapImage(image))); err != nil {
		t.Fatal(err)
	}
	// nvidia.ko for this kernel needs DRM, which vmlinux does not contain. A machine that boots vmlinux cannot load the
	// driver.
	done = build("out-vmlinux", "auto")
	i := slices.IndexFunc(done.Phases, func(p timeline.Phase) bool { return p.Name == "load test" })
	if i < 0 || !strings.Contains(done.Phases[i].Note, "nvidia needs drm") {
		t.Errorf("phases %+v; want a load test that misses drm", done.Phases)
	}
}

// buildResult has the fields of the output of builder build that the tests check.
type buildResult struct {
	Kernel   target.Kernel
	Driver   target.Driver
	LoadTest verdict
	Phases   []timeline.Phase
}

// wrapImage makes a vmlinux from an arm64 Image, with one segment and the section .rodata. It saves the download of
// Debian's own vmlinux, whose package has 800 MB.
func wrapImage(image []byte) []byte {
	const base, head = 0xffff800008000000, 64 + 56
	names := "\x00.rodata\x00.shstrtab\x00"
	size, end := uint64(len(image)), uint64(head+len(image)+len(names))
	h := elf.Header64{
		Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_AARCH64), Version: 1, Entry: base, Ehsize: 64,
		Phoff: 64, Phentsize: 56, Phnum: 1, Shoff: end, Shentsize: 64, Shnum: 3, Shstrndx: 2,
	}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	var out bytes.Buffer
	for _, part := range []any{
		h,
		elf.Prog64{
			Type: uint32(elf.PT_LOAD), Off: head, Vaddr: base, Paddr: base, Filesz: size,
			Memsz: binary.LittleEndian.Uint64(image[16:]), // image_size, see Documentation/arm64/booting.rst
		},
		image, []byte(names), elf.Section64{},
		elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Addr: base, Off: head, Size: size},
		elf.Section64{Name: 9, Type: uint32(elf.SHT_STRTAB), Off: head + size, Size: uint64(len(names))},
	} {
		_ = binary.Write(&out, binary.LittleEndian, part) // a buffer never returns an error
	}
	return out.Bytes()
}

// verdict has the fields of the load test, in `builder build --output json`, that the tests check.
type verdict struct {
	State, Reason, Release, Machine, NVMLVersion, KernelLog string

	EmulatedGPU                                           bool
	Modules                                               []testedModule
	BootSeconds, LoadSeconds, ProbeSeconds, UnloadSeconds float64
}

type testedModule struct{ Name, Load, Unload, Note string }

const (
	stateLoaded = "loaded"
	loadOK      = "ok"
)

func (v *verdict) String() string { return strings.TrimSuffix(v.State+": "+v.Reason, ": ") }

// compilePrograms compiles builder, mirror, and the programs for an architecture's load test. It returns a function
// that runs builder, or mirror if the first argument is "mirror", and decodes the JSON output.
func compilePrograms(t *testing.T, arch target.Arch) func(out any, args ...string) {
	t.Helper()
	bin, suffix := t.TempDir(), ""
	if arch != target.AMD64 {
		suffix = "-" + string(arch)
	}
	for _, p := range []struct {
		pkg, name string
		arch      target.Arch
		cgo       bool
	}{
		{"builder", "builder", target.AMD64, false},
		{"deploy/mirror", "mirror", target.AMD64, false},
		{"pkg/vm/guestinit", "guestinit" + suffix, arch, false},
		{"fetcher/nvmlprobe", "nvmlprobe" + suffix, arch, true},
	} {
		program.Compile(t, filepath.Join(bin, p.name), p.pkg, string(p.arch), p.cgo)
	}
	return func(out any, args ...string) {
		t.Helper()
		start := time.Now()
		argv := append([]string{filepath.Join(bin, "builder")}, args...)
		if args[0] == "mirror" {
			argv = append([]string{filepath.Join(bin, "mirror")}, args[1:]...)
		}
		cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
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
