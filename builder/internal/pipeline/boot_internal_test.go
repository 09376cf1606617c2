package pipeline

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/bootimage"
	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/btfsample"
	"github.com/prebake/prebake/pkg/testkit/installed"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/vm"
)

// linkedKernel returns a vmlinux for amd64 with one segment at 0x1000000, which is the default of x86 kernels.
func linkedKernel(t *testing.T) []byte {
	t.Helper()
	const address, size = 0x1000000, 0x1000
	head := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Entry: address,
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
	}
	copy(head.Ident[:], "\x7fELF\x02\x01\x01")
	segment := elf.Prog64{Type: uint32(elf.PT_LOAD), Off: 64 + 56, Vaddr: address, Paddr: address, Filesz: size,
		Memsz: size, Align: 1}
	var out bytes.Buffer
	for _, part := range []any{head, segment, make([]byte, size)} {
		if err := binary.Write(&out, binary.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	return out.Bytes()
}

// TestFindBoot gives a build a vmlinux that does not fit its headers. A build that does not require the load test goes
// on without it only if nothing is wrong with the modules.
func TestFindBoot(t *testing.T) {
	t.Parallel()
	headers := t.TempDir()
	for name, text := range map[string]string{
		".config":                        "CONFIG_64BIT=y\n",
		"include/generated/utsrelease.h": "#define UTS_RELEASE \"6.6.105+\"\n",
		"include/generated/utsversion.h": "#define UTS_VERSION \"#1 SMP Sat Sep 27 08:48:45 UTC 2025\"\n",
		"include/generated/compile.h": "#define LINUX_COMPILE_BY \"builder\"\n" +
			"#define LINUX_COMPILE_HOST \"2832f747b46d\"\n",
	} {
		file := filepath.Join(headers, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	const begin = "Linux version 6.6.105+ (builder@2832f747b46d) (clang) "
	for name, row := range map[string]struct {
		vmlinux     []byte
		auto        string // part of the reason with which a build goes on without a load test; "" means it fails
		wantAuto    fault.Kind
		wantRequire fault.Kind
	}{
		"of another run of make": {
			vmlinux: btfsample.ELF(".rodata", begin+"#2 SMP Sun Sep 28 08:48:45 UTC 2025\x00"),
			auto:    "vmlinux and the headers come from two runs of make", wantRequire: fault.Mismatch,
		},
		"of another release": {
			vmlinux:  btfsample.ELF(".rodata", "Linux version 6.6.106+ (builder@2832f747b46d) (clang) #1 SMP\x00"),
			wantAuto: fault.Mismatch, wantRequire: fault.Mismatch,
		},
		"that cannot be booted": {
			vmlinux: btfsample.ELF(".rodata", begin+"#1 SMP Sat Sep 27 08:48:45 UTC 2025\x00"),
			auto:    "vmlinux", wantRequire: fault.Unsupported,
		},
	} {
		bucket := t.TempDir()
		folder := filepath.Join(bucket, "17800.0.9", "lakitu")
		if err := errors.Join(os.MkdirAll(folder, 0o755),
			os.WriteFile(filepath.Join(folder, "vmlinux"), row.vmlinux, 0o644)); err != nil {
			t.Fatal(err)
		}
		cache, err := cas.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cache.Close() })
		in := &inputs{kernel: &cossrc.Inputs{Headers: headers, HasVMLinux: true,
			Kernel: target.Kernel{BuildID: "17800.0.9", Board: "lakitu", Release: "6.6.105+", Arch: target.AMD64}}}
		find := func(mode LoadTest) (boot, string, error) {
			r := &run{cfg: Config{LoadTest: mode, Jobs: 1, Cache: cache, KernelMirror: "file://" + bucket}, log: io.Discard,
				line: &timeline.Run{}}
			return r.findBoot(t.Context(), in)
		}
		b, why, err := find(LoadTestAuto)
		if b.dir != "" || row.auto != "" && (err != nil || !strings.Contains(why, row.auto)) ||
			row.auto == "" && !fault.Is(err, row.wantAuto) {
			t.Errorf("a vmlinux %s, auto: %+v, %q, %v; want the reason %q, or %v", name, b, why, err, row.auto, row.wantAuto)
		}
		if b, _, err := find(LoadTestRequire); !fault.Is(err, row.wantRequire) || b.dir != "" {
			t.Errorf("a vmlinux %s, required: %+v, %v; want %v", name, b, err, row.wantRequire)
		}
	}
}

// TestBootFolderWithoutGPU has a kernel for which the emulated GPU does not compile. A build that requires the load
// test must fail, even if the cache has a boot folder without the GPU. Other builds use this boot folder.
func TestBootFolderWithoutGPU(t *testing.T) {
	t.Parallel()
	installed.Programs(t, "bwrap", "make")
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cache.Close() })
	dir := t.TempDir()
	for name, text := range map[string]string{
		"vmlinux":          string(linkedKernel(t)),
		"headers/.config":  "CONFIG_64BIT=y\n",
		"headers/Makefile": "modules:\n\t@echo 'emugpu.c:1:1: error: no such interface'\n\t@false\n",
		"toolchain/bin/x86_64-cros-linux-gnu-gcc":   "#!/bin/sh\nexec /usr/bin/gcc \"$@\"\n",
		"toolchain/bin/x86_64-cros-linux-gnu-strip": "#!/bin/sh\nexec /usr/bin/strip \"$@\"\n",
	} {
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	in := &inputs{kernel: &cossrc.Inputs{
		Kernel:  target.Kernel{Release: "6.1.0-9-test", Arch: target.AMD64},
		Headers: filepath.Join(dir, "headers"), Toolchain: filepath.Join(dir, "toolchain"),
	}}
	makeBoot := func(mode LoadTest) (boot, error) {
		r := &run{cfg: Config{LoadTest: mode, Jobs: 1, Cache: cache}, log: io.Discard, line: &timeline.Run{}}
		return r.makeBoot(t.Context(), in, filepath.Join(dir, "vmlinux"), sign.Material{Digest: "sha256:v"},
			bootimage.Facts{Banners: []string{"Linux version 6.1.0-9-test"}, BuildID: "c0ffee"})
	}
	made, err := makeBoot(LoadTestAuto)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(made.dir, vm.BootGPU)); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the boot folder has an emulated GPU (%v); want none", err)
	}
	if len(made.materials) != 2 || made.materials[0].BuildID != "c0ffee" || made.materials[1].BuildID != "" {
		t.Errorf("the signed test result will name %+v; want vmlinux with its build id, and the image", made.materials)
	}
	if _, err := makeBoot(LoadTestRequire); !fault.Is(err, fault.APIBreak) {
		t.Errorf("makeBoot with the load test required = %v; want %v", err, fault.APIBreak)
	}
	if again, err := makeBoot(LoadTestAuto); err != nil || again.dir != made.dir {
		t.Errorf("makeBoot again = %s, %v; want %s", again.dir, err, made.dir)
	}
}
