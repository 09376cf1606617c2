package compile_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/installed"
	"github.com/prebake/prebake/pkg/timeline"
)

// toy returns a request for a tiny driver and kernel. The makefiles print lines of the same form as NVIDIA's and the
// kernel's makefiles, for example for a compiled file.
func toy(t *testing.T) compile.Request {
	t.Helper()
	installed.Programs(t, "bwrap", "make", "gcc", "strip")
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"headers/.config": "CONFIG_MODVERSIONS=y\n# CONFIG_LD_IS_LLD is not set\n",
		"headers/Makefile": `modules:
	@echo "  CC [M]  $(M)/emu.o"
	@$(CC) -g -c $(M)/emu.c -o $(M)/emu.ko
`,
		"source/Makefile": `modules:
	@echo " CONFTEST: one"
	@echo "  CC [M]  $(CURDIR)/nvidia/nv.o"
	@$(CC) -g -c nvidia/nv.c -o nv.o
	@echo "  MODPOST $(CURDIR)/Module.symvers"
	@cp nv.o nvidia.ko; cp nv.o nvidia-uvm.ko
	@echo "ARGS SYSSRC=$(SYSSRC) KERNEL_UNAME=$(KERNEL_UNAME) ARCH=$(ARCH) CC=$(CC) STRIP=$(STRIP) LD=$(LD) SYMVERS=$(IGNORE_MISSING_MODULE_SYMVERS)"
	@tr '\0' '\n' < /proc/$$PPID/environ | sort
`,
		"source/Kbuild": "NV_HEADER_PRESENCE_TESTS = \\\n linux/efi.h \\\n asm/page.h\n\nX = y\n",
		"source/nvidia/nv.Kbuild": "obj-m += nvidia.o\nNVIDIA_SOURCES += nvidia/nv.c\nNV_CONFTEST_TYPE_COMPILE_TESTS += " +
			"timespec64\n",
		"source/nvidia/nv.c":        "const char *where = __FILE__; int nv(void) { return 1; }\n",
		"toolchain/bin/placeholder": "",
	})
	for name, tool := range map[string]string{"gcc": "gcc", "strip": "strip"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(path, filepath.Join(dir, "toolchain/bin/x86_64-cros-linux-gnu-"+name)); err != nil {
			t.Fatal(err)
		}
	}
	return compile.Request{
		Source: filepath.Join(dir, "source"), Headers: filepath.Join(dir, "headers"),
		Toolchain: filepath.Join(dir, "toolchain"),
		Env:       map[string]string{"CC": "x86_64-cros-linux-gnu-gcc"},
		Release:   "6.1.0-50-cloud-amd64", Driver: target.Driver{Version: "535.261.03", Flavour: target.Open},
		Arch:    target.AMD64,
		WorkDir: t.TempDir(),
	}
}

func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func names(phases []timeline.Phase) []string {
	var all []string
	for _, p := range phases {
		all = append(all, p.Name)
	}
	return all
}

func TestModules(t *testing.T) {
	t.Parallel()
	r := toy(t)
	var log bytes.Buffer
	progress := map[string]int{}
	r.Log, r.Progress = &log, func(phase string, _, total int) { progress[phase] = total }
	result, err := compile.Modules(t.Context(), r)
	if err != nil {
		t.Fatalf("Modules = %v\n%s", err, &log)
	}
	if diff := cmp.Diff([]string{"conftest", "compile", "link", "strip"}, names(result.Phases)); diff != "" {
		t.Errorf("phases differ (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]int{"conftest": 3, "compile": 1, "link": 2, "strip": 2}, progress); diff != "" {
		t.Errorf("progress totals differ (-want +got):\n%s", diff)
	}
	want := map[string]string{"nvidia": filepath.Join(r.WorkDir, "modules/nvidia.ko"),
		"nvidia-uvm": filepath.Join(r.WorkDir, "modules/nvidia-uvm.ko")}
	if diff := cmp.Diff(want, result.Modules); diff != "" {
		t.Errorf("modules differ (-want +got):\n%s", diff)
	}
	data, err := os.ReadFile(want["nvidia"])
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(want["nvidia"]); err != nil || info.Mode() != 0o644 {
		t.Errorf("mode is %v, %v; want 0644", info.Mode(), err)
	}
	if bytes.Contains(data, []byte(".debug_info")) {
		t.Error("nvidia.ko has debug sections; want them stripped")
	}
	_, seen, _ := strings.Cut(log.String(), "ARGS ")
	const wantSeen = `SYSSRC=/prebake/kernel KERNEL_UNAME=6.1.0-50-cloud-amd64 ARCH=x86_64 CC=x86_64-cros-linux-gnu-gcc STRIP=x86_64-cros-linux-gnu-strip LD=x86_64-cros-linux-gnu-ld SYMVERS=
HOME=/nonexistent
KBUILD_BUILD_HOST=prebake
KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 1970
KBUILD_BUILD_USER=prebake
LC_ALL=C
PATH=/prebake/guard:/prebake/toolchain/bin:/prebake/toolchain/usr/bin:/usr/bin:/bin
PWD=/prebake/src
SOURCE_DATE_EPOCH=0
TZ=UTC
`
	if diff := cmp.Diff(wantSeen, seen); diff != "" {
		t.Errorf("what make saw differs (-want +got):\n%s", diff)
	}
}

// TestSameBytes checks that another work folder and another number of jobs do not change the bytes of the modules.
func TestSameBytes(t *testing.T) {
	t.Parallel()
	r := toy(t)
	var first []byte
	for i, dir := range []string{t.TempDir(), t.TempDir()} {
		r.WorkDir, r.Jobs = dir, 1+3*i
		result, err := compile.Modules(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(result.Modules["nvidia"])
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 && !bytes.Equal(first, data) {
			t.Errorf("two runs differ: %d and %d bytes", len(first), len(data))
		}
		first = data
	}
}

func TestExternal(t *testing.T) {
	t.Parallel()
	r := toy(t)
	r.Source = t.TempDir()
	write(t, r.Source, map[string]string{"emu.c": "int emu;\n", "Kbuild": "obj-m := emu.o\n"})
	result, err := compile.External(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"compile", "strip"}, names(result.Phases)); diff != "" || result.Modules["emu"] == "" {
		t.Errorf("External = %+v; phases differ (-want +got):\n%s", result, diff)
	}
}

func TestFailures(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name string
		edit func(t *testing.T, r *compile.Request)
		kind fault.Kind
		want string
	}{
		{"source does not compile", func(t *testing.T, r *compile.Request) {
			write(t, r.Source, map[string]string{"nvidia/nv.c": "int nv(void) { return gone; }\n"})
		}, fault.APIBreak, "compile 535.261.03-open for kernel release 6.1.0-50-cloud-amd64: nvidia/nv.c:1:23: error: " +
			"'gone' undeclared (first use in this function)"},
		{"nothing built", func(t *testing.T, r *compile.Request) {
			write(t, r.Source, map[string]string{"Makefile": "modules:\n\t@true\n"})
		}, fault.Internal, "made no module"},
		{"killed", func(t *testing.T, r *compile.Request) {
			write(t, r.Source, map[string]string{"Makefile": "modules:\n\t@kill -9 $$PPID\n"})
		}, fault.OutOfMemory, "killed"},
		{"disk full", func(t *testing.T, r *compile.Request) {
			write(t, r.Source, map[string]string{"Makefile": "modules:\n\t@cat /prebake/src/Kbuild > /dev/full\n"})
		}, fault.DiskFull, "No space left on device"},
		{"inputs are read-only", func(t *testing.T, r *compile.Request) {
			write(t, r.Source, map[string]string{"Makefile": "modules:\n\ttouch /prebake/kernel/x\n"})
		}, fault.Internal, "Read-only file system"},
		{"no compiler", func(t *testing.T, r *compile.Request) { r.Env["CC"] = "x86_64-cros-linux-gnu-clang" },
			fault.InputMissing, "the toolchain has no bin/x86_64-cros-linux-gnu-clang"},
		{"compiler is a command line", func(t *testing.T, r *compile.Request) { r.Env["CC"] = "gcc -Dx; rm -rf /" },
			fault.Usage, "want the name of a program"},
		{"no configuration", func(t *testing.T, r *compile.Request) { r.Headers = t.TempDir() },
			fault.InputMissing, "kernel configuration"},
		{"no strip", func(t *testing.T, r *compile.Request) {
			if err := os.Remove(filepath.Join(r.Toolchain, "bin/x86_64-cros-linux-gnu-strip")); err != nil {
				t.Fatal(err)
			}
		}, fault.InputMissing, "find strip"},
		{"link out of the sources", func(t *testing.T, r *compile.Request) {
			if err := os.Symlink("../../etc/passwd", filepath.Join(r.Source, "x")); err != nil {
				t.Fatal(err)
			}
		}, fault.Usage, "x is a link to ../../etc/passwd, which is outside the source folder"},
		{"several things at once", func(t *testing.T, r *compile.Request) {
			r.Release, r.Jobs, r.Arch = "6.1; x", -1, "mips"
			write(t, r.WorkDir, map[string]string{"left": ""})
		}, fault.Internal, "kernel release"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r := toy(t)
			row.edit(t, &r)
			var log bytes.Buffer
			r.Log = &log
			result, err := compile.Modules(t.Context(), r)
			if fault.Of(err) != row.kind || err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("Modules = %v: %v\nwant %v: %s\n%s", fault.Of(err), err, row.kind, row.want, &log)
			}
			if len(result.Modules) != 0 {
				t.Errorf("Modules left %v; want nothing", result.Modules)
			}
		})
	}
}

// TestCancel cancels the build when it reports progress for the first time. The result must have the phases that ran.
func TestCancel(t *testing.T) {
	t.Parallel()
	r := toy(t)
	write(t, r.Source, map[string]string{"Makefile": "modules:\n\t@echo ' CONFTEST: one'\n\t@sleep 600\n"})
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("enough")
	r.Progress = func(string, int, int) { cancel(stop) }
	result, err := compile.Modules(ctx, r)
	if !errors.Is(err, stop) || !fault.Is(err, fault.Cancelled) {
		t.Errorf("Modules = %v (%v); want the cause, cancelled", err, fault.Of(err))
	}
	if len(result.Phases) != 1 || !result.Phases[0].Failed {
		t.Errorf("phases are %+v; want one, failed", result.Phases)
	}
}

func TestTimeLimit(t *testing.T) {
	t.Parallel()
	plain, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	if _, err := compile.Modules(plain, toy(t)); !fault.Is(err, fault.TimedOut) || fault.Hint(err) == "" {
		t.Errorf("Modules = %v (%v); want timed-out with a hint", err, fault.Of(err))
	}
	named, cancel := context.WithTimeoutCause(t.Context(), 0,
		fault.New(fault.TimedOut, "ran longer than 0s", "raise --limit"))
	defer cancel()
	if _, err := compile.Modules(named, toy(t)); !fault.Is(err, fault.TimedOut) || fault.Hint(err) != "raise --limit" {
		t.Errorf("Modules = %v (%v, hint %q); want the cause and its hint", err, fault.Of(err), fault.Hint(err))
	}
}

// TestHidesWhoCompiled checks that the number and time of the kernel's build do not get into a module. No fingerprint
// covers them, so they would make modules of one fingerprint differ. Before Linux 6.1 they are in compile.h, and
// NVIDIA's driver prints them.
func TestHidesWhoCompiled(t *testing.T) {
	t.Parallel()
	var sums []string
	for _, built := range []string{"#1 SMP Thu Jan  1 00:00:00 UTC 2026", "#2 SMP Fri Jan  2 00:00:00 UTC 2026"} {
		r := toy(t)
		write(t, filepath.Dir(r.Source), map[string]string{
			"headers/include/generated/compile.h": "/* This file is auto generated, version " + built[1:2] +
				" */\n#define UTS_VERSION\t\"" + built + "\"\n#define LINUX_COMPILE_BY \"me\"\n",
			"source/nvidia/nv.c": "#include \"/prebake/kernel/include/generated/compile.h\"\nconst char " +
				"when[] = UTS_VERSION; int nv(void) { return 1; }\n",
		})
		result, err := compile.Modules(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(result.Modules["nvidia"])
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(data, []byte(built)) {
			t.Errorf("the module contains %q; want it hidden", built)
		}
		sums = append(sums, string(data))
	}
	if sums[0] != sums[1] {
		t.Error("two builds of one kernel give two modules")
	}
}

// TestMachineTooOld checks that the build fails before it compiles anything, if the kernel's build tools (here fixdep)
// need a newer C library than this machine has.
func TestMachineTooOld(t *testing.T) {
	t.Parallel()
	r := toy(t)
	program, err := os.ReadFile("/usr/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	newer := bytes.ReplaceAll(program, []byte("GLIBC_2.34"), []byte("GLIBC_9.34"))
	if bytes.Equal(newer, program) {
		t.Skip("/usr/bin/true asks for no GLIBC_2.34")
	}
	path := filepath.Join(r.Headers, "scripts/basic/fixdep")
	write(t, r.Headers, map[string]string{"scripts/basic/fixdep": string(newer)})
	if err := os.Chmod(path, 0o755); err != nil {
		t.Fatal(err)
	}
	result, err := compile.Modules(t.Context(), r)
	if fault.Of(err) != fault.Usage || !strings.Contains(err.Error(), "GLIBC_9.34") || fault.Hint(err) == "" ||
		len(result.Phases) > 0 {
		t.Errorf("Modules = %v (%v, %q) after %v; want it refused at once", err, fault.Of(err), fault.Hint(err),
			names(result.Phases))
	}
}
