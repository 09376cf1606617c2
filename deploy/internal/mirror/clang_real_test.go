package mirror

import (
	"bytes"
	"debug/elf"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/gotest"
	"github.com/prebake/prebake/pkg/testkit/program"
	"github.com/prebake/prebake/pkg/vm"
)

// TestClangKernel lets the builder build a driver for a kernel like COS's: compiled with clang and lld, without symbol
// versions, with LoadPin. The builder compiles the driver with clang, loads it in a virtual machine that boots this
// kernel, and publishes it.
//
// The kernel takes minutes to compile, so the test runs only if PREBAKE_CLANG_CACHE is set to the cache folder of
// `mirror`. `make clang` sets it.
func TestClangKernel(t *testing.T) {
	cache := os.Getenv("PREBAKE_CLANG_CACHE")
	if cache == "" {
		t.Skip("PREBAKE_CLANG_CACHE is not set to the cache folder of `mirror --only-clang`; run make clang")
	}
	dir := t.TempDir()
	builder := compilePrograms(t, target.AMD64)

	mirror := filepath.Join(dir, "mirror")
	var made Result
	builder(&made, "mirror", "--only-clang", "--out", mirror, "--cache", cache, "--output", "json")
	if len(made.Builds) != 1 {
		t.Fatalf("mirror made %v; want one build", made.Builds)
	}
	kernel := made.Builds[0]
	build := filepath.Join(mirror, "cos", kernel.BuildID, kernel.Board)
	checkSignatures(t, build, checkClangBuild(t, build, kernel.Release), kernel.Release)

	v := buildClang(t, builder, mirror, dir, filepath.Join(dir, "cache"), kernel)
	checkAnswers(t, filepath.Join(dir, "cache"))
	var loaded []string
	for _, m := range v.Modules {
		if m.Load == loadOK {
			loaded = append(loaded, m.Name)
		} else {
			t.Logf("%s: %s, %s", m.Name, m.Load, m.Note)
		}
	}
	if diff := cmp.Diff([]string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm"},
		loaded[:min(4, len(loaded))]); diff != "" {
		t.Errorf("modules loaded differ (-want +got):\n%s", diff)
	}
	if !strings.Contains(v.KernelLog, "LoadPin: kernel-module pinning-excluded") {
		t.Errorf("the kernel's LoadPin says nothing about the modules:\n%s", v.KernelLog)
	}

	// TestRealSameBytes checks that caches and precompiled headers do not change the modules.
	cmd := exec.CommandContext(t.Context(), "go", "test", "-v", "-count=1", "-timeout=60m", "-run=^TestRealSameBytes$",
		"github.com/prebake/prebake/builder/internal/compile")
	cmd.Env = append(os.Environ(), "PREBAKE_MIRROR=file://"+mirror, "PREBAKE_CELLS="+kernel.BuildID+"/"+v.NVMLVersion)
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err := gotest.Check(out, err); err != nil {
		t.Errorf("same bytes: %v", err)
	}
}

// buildClang builds the newest driver for the kernel, and returns the verdict of the load test, which must be "loaded".
// It writes the key and the artifact to dir.
func buildClang(t *testing.T, builder func(out any, args ...string), mirror, dir, cache string, kernel Build) verdict {
	t.Helper()
	key := filepath.Join(dir, "key")
	builder(nil, "keygen", key)
	var done buildResult
	builder(&done, "build", "--build-id", kernel.BuildID, "--driver", "latest", "--flavour", "proprietary",
		"--kernel-mirror", "file://"+mirror+"/cos", "--driver-mirror", "file://"+mirror+"/drivers",
		"--cache", cache, "--key", key, "--to", "oci:"+filepath.Join(dir, "out"),
		"--load-test", "require", "--output", "json")
	v := done.LoadTest
	if v.State != stateLoaded || v.NVMLVersion != done.Driver.Version || v.Release != kernel.Release {
		t.Errorf("load test: %s %s, NVML %q, kernel %q; want loaded, %s, %s",
			v.State, v.Reason, v.NVMLVersion, v.Release, done.Driver.Version, kernel.Release)
	}
	return v
}

// TestClangCell lets the builder build and load-test a driver for the kernel of TestClangKernel. As in COS's buckets,
// there is a vmlinux but no boot archive. The kernel has LoadPin, no entry point for PVH and no symbol versions, and
// panics on an oops.
//
// The kernel comes from the cache. If the cache has no kernel of Debian's present source, the test compiles it if
// PREBAKE_CLANG_COMPILE is set, and is skipped otherwise.
func TestClangCell(t *testing.T) {
	cache := os.Getenv("PREBAKE_CLANG_CACHE")
	if cache == "" {
		t.Skip("PREBAKE_CLANG_CACHE is not set to the cache folder of `mirror`; run make clang-cell")
	}
	dir := t.TempDir()
	builder := compilePrograms(t, target.AMD64)
	mirror := filepath.Join(dir, "mirror")
	var made Result
	args := []string{"mirror", "--only-clang", "--vmlinux", "--no-boot-archive", "--out", mirror, "--cache", cache,
		"--output", "json"}
	if os.Getenv("PREBAKE_CLANG_COMPILE") == "" {
		cached := Config{OnlyClang: true, ClangCached: true, VMLinux: true, NoBoot: true, Out: mirror, Cache: cache}
		_, err := Make(t.Context(), cached.WithDefaults())
		if errors.Is(err, errNotCompiled) {
			t.Skipf("%v; PREBAKE_CLANG_COMPILE=1 compiles it", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, "--clang-cached")
	}
	builder(&made, args...)
	kernel := made.Builds[0]
	bucket := filepath.Join(mirror, "cos", kernel.BuildID, kernel.Board)
	if _, err := os.Stat(filepath.Join(bucket, "prebake-boot.tgz")); !os.IsNotExist(err) {
		t.Fatalf("the bucket has an archive to boot from: %v", err)
	}
	linked, err := elf.Open(filepath.Join(bucket, "vmlinux"))
	if err != nil {
		t.Fatal(err)
	}
	defer linked.Close()
	if notes := linked.Section(".notes"); notes == nil {
		t.Error("vmlinux has no notes")
	}
	// The builder's cache keeps modules and load test verdicts of earlier runs. The test removes the verdicts, so that the
	// load test runs again.
	builds := filepath.Join(cache, "clang-builds")
	verdicts := filepath.Join(builds, "facts", "loadtest")
	if err := os.RemoveAll(verdicts); err != nil {
		t.Fatal(err)
	}
	v := buildClang(t, builder, mirror, dir, builds, kernel)
	if _, err := os.Stat(verdicts); err != nil {
		t.Errorf("the load test wrote no new verdict to the cache: %v", err)
	}
	for i, name := range []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm"} { // DRM is built in
		if i >= len(v.Modules) || v.Modules[i].Name != name || v.Modules[i].Load != loadOK {
			t.Errorf("modules %+v; want %s loaded", v.Modules, name)
		}
	}
	if !strings.Contains(v.KernelLog, "LoadPin: kernel-module pinning-excluded") {
		t.Errorf("the kernel's LoadPin says nothing about the modules:\n%s", v.KernelLog)
	}
}

// checkAnswers looks for some of conftest's answers about this kernel series in the builder's cache. For many
// functions, conftest.sh takes a failed compile as "present". If clang's warnings were errors, absent functions would
// wrongly count as present.
func checkAnswers(t *testing.T, cache string) {
	t.Helper()
	var known strings.Builder
	err := filepath.WalkDir(filepath.Join(cache, "facts"), func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(name)
		known.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"#undef NV_IOREMAP_DRIVER_HARDENED_PRESENT", "#undef NV_WRITE_CR4_PRESENT", "#undef NV_IOASID_GET_PRESENT",
		"#define NV_TIMER_SETUP_PRESENT", "#define NV_GET_USER_PAGES_REMOTE_HAS_ARGS_FLAGS_LOCKED_VMAS",
		"#define NV_MMU_NOTIFIER_OPS_HAS_INVALIDATE_RANGE", "#define NV_DRM_ATOMIC_MODESET_AVAILABLE",
		"#define NV_IS_EXPORT_SYMBOL_PRESENT_close_fd 1",
	} {
		// the cache is JSON, which writes a line end as \n
		if !strings.Contains(known.String(), want+`\n`) {
			t.Errorf("conftest did not answer %q", want)
		}
	}
}

// checkClangBuild checks the files of the published COS build. It returns a folder with the unpacked archives.
func checkClangBuild(t *testing.T, build, release string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, name := range []string{"kernel-headers.tgz", "prebake-boot.tgz"} {
		if _, err := archive.UnpackFile(t.Context(), filepath.Join(build, name), dir, archive.Options{}); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.HasSuffix(release, "+") {
		t.Errorf("release = %q; want it to end with + as the releases of COS's kernels do", release)
	}
	config, err := os.ReadFile(filepath.Join(dir, "usr/src/linux-headers-"+release, ".config"))
	if err != nil {
		t.Fatal(err)
	}
	if missing := missingLines(configText(), string(config)); len(missing) > 0 {
		t.Errorf(".config lacks %v", missing)
	}
	gpu, err := os.ReadFile(filepath.Join(dir, "emugpu.ko"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasSuffix(gpu, []byte("~Module signature appended~\n")) {
		t.Error("emugpu.ko is not signed")
	}
	for _, name := range []string{signingKeyName, signingCertName, "toolchain.tar.xz", "toolchain_env", "kernel_commit"} {
		if _, err := os.Stat(filepath.Join(build, name)); err != nil {
			t.Error(err)
		}
	}
	return dir
}

// checkSignatures boots the kernel with signatures enforced, and checks that it loads only modules that are signed with
// the published key. It also checks that LoadPin pins modules to one file system if the kernel arguments do not exclude
// modules.
func checkSignatures(t *testing.T, build, unpacked, release string) {
	t.Helper()
	init := program.Build(t, "pkg/vm/guestinit", "")
	var pair signingPair
	var err error
	if pair.key, err = os.ReadFile(filepath.Join(build, signingKeyName)); err != nil {
		t.Fatal(err)
	}
	if pair.cert, err = os.ReadFile(filepath.Join(build, signingCertName)); err != nil {
		t.Fatal(err)
	}
	unsigned, err := os.ReadFile(filepath.Join(unpacked, "modules/test_module.ko"))
	if err != nil {
		t.Fatal(err)
	}
	signed := filepath.Join(t.TempDir(), "signed.ko")
	if err := os.WriteFile(signed, unsigned, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := signModule(t.Context(), filepath.Join(unpacked, "usr/src/linux-headers-"+release), signed,
		pair); err != nil {
		t.Fatal(err)
	}
	res, err := vm.Run(t.Context(), vm.Config{
		Boot: unpacked, Init: init, KernelArgs: []string{"module.sig_enforce=1", "loadpin.exclude=firmware"},
		Files: []vm.File{{Name: "/unsigned.ko", Data: unsigned}, {Name: "/signed.ko", Path: signed}},
		Steps: []vm.Step{
			{Name: "unsigned", Argv: []string{"@insmod", "/unsigned.ko"}, KeepGoing: true},
			{Name: "signed", Argv: []string{"@insmod", "/signed.ko"}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]struct {
		errno syscall.Errno
		log   string
	}{
		"unsigned": {syscall.EKEYREJECTED, "LoadPin: kernel-module pinned"},
		"signed":   {0, "Hello, world"},
	} {
		s, _ := res.Step(name)
		if syscall.Errno(s.ExitCode) != want.errno || !strings.Contains(s.KernelLog, want.log) {
			t.Errorf("insmod of the %s module = %d (%s); want %d and %q in the log:\n%s", name, s.ExitCode, s.Error, want.errno,
				want.log, s.KernelLog)
		}
	}
}
