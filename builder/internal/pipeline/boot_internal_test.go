package pipeline

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/builder/internal/bootimage"
	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
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

// TestBootFolderWithoutGPU has a kernel for which the emulated GPU does not compile. A build that requires the load
// test must fail, even if the cache has a boot folder without the GPU. Other builds use this boot folder.
func TestBootFolderWithoutGPU(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"bwrap", "make"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(tool + " is missing: apt-get install bubblewrap make")
		}
	}
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
			bootimage.Facts{Banners: []string{"Linux version 6.1.0-9-test"}})
	}
	made, err := makeBoot(LoadTestAuto)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(made.dir, vm.BootGPU)); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the boot folder has an emulated GPU (%v); want none", err)
	}
	if _, err := makeBoot(LoadTestRequire); !fault.Is(err, fault.APIBreak) {
		t.Errorf("makeBoot with the load test required = %v; want %v", err, fault.APIBreak)
	}
	if again, err := makeBoot(LoadTestAuto); err != nil || again.dir != made.dir {
		t.Errorf("makeBoot again = %s, %v; want %s", again.dir, err, made.dir)
	}
}
