package modcheck_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/loadtest"
	"github.com/prebake/prebake/builder/internal/modcheck"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/program"
)

// kernels returns the oldest and the newest kernel of the mirror that PREBAKE_MIRROR names.
func kernels(t *testing.T) (older, newer *cossrc.Inputs) {
	t.Helper()
	mirror := os.Getenv("PREBAKE_MIRROR")
	if mirror == "" {
		t.Skip("PREBAKE_MIRROR is not set: want the file:// URL of a folder with cos/, as `mirror` makes it")
	}
	builds, err := filepath.Glob(filepath.Join(strings.TrimPrefix(mirror, "file://"), "cos", "*.0.*", "lakitu",
		"kernel-headers.tgz"))
	if err != nil || len(builds) < 2 {
		t.Fatalf("builds of %s: %v, %v; want two or more", mirror, builds, err)
	}
	slices.Sort(builds)
	bucket, err := cosbucket.Open(t.Context(), mirror+"/cos")
	if err != nil {
		t.Fatal(err)
	}
	defer bucket.Close()
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cache.Close() })
	fetch := func(file string) *cossrc.Inputs {
		in, err := cossrc.Fetch(t.Context(), bucket, cache, filepath.Base(filepath.Dir(filepath.Dir(file))), "lakitu",
			func(string) {})
		if err != nil {
			t.Fatal(err)
		}
		if in.Boot == "" {
			t.Fatalf("%s has no boot archive; want one", in.Kernel)
		}
		return in
	}
	return fetch(builds[0]), fetch(builds[len(builds)-1])
}

func facts(in *cossrc.Inputs) modcheck.Kernel {
	return modcheck.Kernel{Headers: in.Headers, Boot: in.Boot, Release: in.Kernel.Release, Arch: in.Kernel.Arch,
		Fingerprint: in.Fingerprint, Version: "1.2.3"}
}

// standIn compiles a small module in place of a driver, and stamps it with the kernel's fingerprint. deed says what the
// module does at load: OOPS, WARN or NOTHING (see testdata/module).
func standIn(t *testing.T, in *cossrc.Inputs, deed string) string {
	t.Helper()
	return typedStandIn(t, in, deed, "")
}

// typedStandIn is like standIn, but gives the module BTF. types is a file with the kernel's BTF. If types is "", the
// module gets no BTF.
func typedStandIn(t *testing.T, in *cossrc.Inputs, deed, types string) string {
	t.Helper()
	dir := t.TempDir()
	source, work := filepath.Join(dir, "source"), filepath.Join(dir, "work")
	for _, d := range []string{source, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile("testdata/module/nvidia.c")
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"nvidia.c": string(text),
		"Kbuild": "obj-m := nvidia.o\nccflags-y := -DDEED_" + deed + "\n"} {
		if err := os.WriteFile(filepath.Join(source, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var log bytes.Buffer
	made, err := compile.External(t.Context(),
		compile.Request{Source: source, Headers: in.Headers, Toolchain: in.Toolchain, Env: in.Env,
			Release: in.Kernel.Release, Arch: in.Kernel.Arch, BTF: types, WorkDir: work, Log: &log})
	if err != nil {
		t.Fatalf("External = %v\n%s", err, &log)
	}
	out := filepath.Join(dir, "nvidia.ko")
	if err := modcheck.Stamp(out, made.Modules["nvidia"], in.Fingerprint); err != nil {
		t.Fatal(err)
	}
	return out
}

// replaceText returns the path of a copy of a module with one text replaced by another of the same length.
func replaceText(t *testing.T, file, old, text string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(old) != len(text) || !bytes.Contains(data, []byte(old)) {
		t.Fatalf("%s: cannot put %q where %q is", file, text, old)
	}
	out := filepath.Join(t.TempDir(), "nvidia.ko")
	if err := os.WriteFile(out, bytes.ReplaceAll(data, []byte(old), []byte(text)), 0o644); err != nil {
		t.Fatal(err)
	}
	return out
}

// exported is a symbol that the kernel exports and the test's module imports. unknown differs from it by one letter,
// and no kernel exports it.
const exported, unknown = "proc_create_single_data", "proc_create_zingle_data"

// TestReal checks modules against two real kernels. Both parts use the same kernels, because it takes long to unpack
// them.
func TestReal(t *testing.T) {
	t.Parallel()
	own, other := kernels(t)
	t.Logf("%s %s against %s %s", own.Kernel, own.Kernel.Release, other.Kernel, other.Kernel.Release)
	t.Run("gate", func(t *testing.T) {
		t.Parallel()
		realGate(t, own, other)
	})
	t.Run("types", func(t *testing.T) {
		t.Parallel()
		realTypes(t, own, other)
	})
}

// realGate checks modules against real kernels. A module without a fault must pass. A module must be refused if it
//
//   - was compiled for a sibling kernel,
//   - needs a symbol that the kernel lacks,
//   - has a wrong vermagic,
//   - crashes the kernel, or
//   - causes a warning of the kernel.
func realGate(t *testing.T, own, other *cossrc.Inputs) {
	t.Helper()
	good, foreign := standIn(t, own, "NOTHING"), standIn(t, other, "NOTHING")
	sibling := replaceText(t, foreign, "vermagic="+other.Kernel.Release, "vermagic="+own.Kernel.Release)

	for _, row := range []struct {
		name, file string
		want       []string // texts that the errors must contain; none if the module must pass
	}{
		{"good", good, nil},
		{"sibling kernel", foreign,
			[]string{"made for kernel release " + other.Kernel.Release + "; this kernel has release " + own.Kernel.Release}},
		{"sibling kernel of the same release", sibling,
			[]string{"checksum", "made for a kernel with build salt", "made for ABI fingerprint " + string(other.Fingerprint)}},
		{"unresolved symbol", replaceText(t, good, exported, unknown),
			[]string{"symbol " + unknown + ": is exported neither by this kernel nor by one of these modules"}},
		{"wrong vermagic", replaceText(t, good, " SMP preempt", " XMP preempt"),
			[]string{"XMP preempt", "this kernel wants"}},
	} {
		t.Run("static/"+row.name, func(t *testing.T) {
			t.Parallel()
			magic, err := modcheck.Check(map[string]string{"nvidia": row.file}, facts(own))
			if len(row.want) == 0 {
				if err != nil || !strings.HasPrefix(magic, own.Kernel.Release+" ") {
					t.Errorf("Check = %q, %v; want it to pass", magic, err)
				}
				return
			}
			t.Log(err)
			if !fault.Is(err, fault.CheckFailed) || fault.Hint(err) == "" {
				t.Errorf("Check = %v (%v); want check-failed with a hint", err, fault.Of(err))
			}
			for _, want := range row.want {
				if !strings.Contains(fmt.Sprint(err), want) {
					t.Errorf("Check = %v; want %q in it", err, want)
				}
			}
		})
	}

	init, probe := program.Build(t, "pkg/vm/guestinit", string(target.AMD64)),
		program.Build(t, "builder/internal/modcheck/testdata/probe", string(target.AMD64))
	for _, row := range []struct {
		name, file string
		want       []string
	}{
		{"good", good, nil},
		{"sibling kernel of the same release", sibling, []string{"load nvidia", "disagrees about version of symbol"}},
		{"unresolved symbol", replaceText(t, good, exported, unknown), []string{"load nvidia", "Unknown symbol " + unknown}},
		{"oops", standIn(t, own, "OOPS"),
			[]string{"load nvidia: the kernel crashed: BUG: kernel NULL pointer dereference, address: 0000000000000010"}},
		{"warning", standIn(t, own, "WARN"),
			[]string{"the modules tainted the kernel: warning", "WARNING: CPU: 0", "standin_init"}},
	} {
		t.Run("machine/"+row.name, func(t *testing.T) {
			t.Parallel()
			userspace := t.TempDir()
			lib := filepath.Join(userspace, "lib64", "libnvidia-ml.so.1")
			if err := os.Mkdir(filepath.Dir(lib), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(probe, lib); err != nil {
				t.Fatal(err)
			}
			v, err := loadtest.Run(t.Context(), loadtest.Config{Boot: own.Boot, Modules: map[string]string{"nvidia": row.file},
				Userspace: userspace, Version: "1.2.3", Init: init, Probe: probe, Timeout: 3 * time.Minute}, nil)
			if v == nil {
				t.Fatalf("Run = %v; want a verdict", err)
			}
			t.Logf("%s (%.1f s)", v, v.Seconds)
			if len(row.want) == 0 {
				if err != nil || v.State != loadtest.Loaded {
					t.Errorf("Run = %s, %v; want loaded\n%s", v, err, v.KernelLog)
				}
				return
			}
			if !fault.Is(err, fault.LoadTestFailed) || v.State != loadtest.Rejected {
				t.Errorf("Run = %s, %v; want rejected, load-test-failed", v, err)
			}
			for _, want := range row.want {
				if !strings.Contains(v.String(), want) {
					t.Errorf("verdict = %s; want %q in it", v, want)
				}
			}
		})
	}
}
