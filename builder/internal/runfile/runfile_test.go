package runfile_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/prebake/prebake/builder/internal/runfile"
	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

// payload returns a compressed tar with one file.
func payload(t testing.TB, format archive.Format) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser
	var err error
	switch format {
	case archive.Gzip:
		w = gzip.NewWriter(&b)
	case archive.XZ:
		w, err = xz.NewWriter(&b)
	case archive.Zstd:
		w, err = zstd.NewWriter(&b)
	}
	if err != nil {
		t.Fatal(err)
	}
	tw := tar.NewWriter(w)
	if err := tw.WriteHeader(&tar.Header{Name: "./.manifest", Typeflag: tar.TypeReg, Mode: 0o644, Size: 5}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(tw, "hello"); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// script returns the shell part of a runfile, with n lines. One of them is the given line, which says how many lines to
// skip.
func script(skip string, n int) string {
	lines := []string{"#!/bin/sh", "# made for a test", "CRCsum=\"1\"", skip}
	for len(lines) < n {
		lines = append(lines, fmt.Sprintf("echo line %d", len(lines)+1))
	}
	return strings.Join(lines, "\n") + "\n"
}

func TestPayload(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name   string
		head   string
		format archive.Format
		skip   int
	}{
		{"skip names the payload's line, as NVIDIA writes it", script("skip=41", 40), archive.XZ, 41},
		{"zstd after the same script", script("skip=41", 40), archive.Zstd, 41},
		{"skip names the script's last line, as makeself writes it", script(`skip="40"`, 40), archive.Gzip, 40},
		{"quoted, the payload's line", script(`skip="41"`, 40), archive.Zstd, 41},
		{"single quotes", script(`skip='40'`, 40), archive.XZ, 40},
		{"shortest", script("skip=5", 4), archive.Gzip, 5},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			body, h, err := runfile.Payload(io.MultiReader(strings.NewReader(r.head), bytes.NewReader(payload(t, r.format))))
			if err != nil {
				t.Fatal(err)
			}
			want := runfile.Header{Skip: r.skip, Offset: int64(len(r.head)), Format: r.format}
			if h != want {
				t.Errorf("header = %+v; want %+v", h, want)
			}
			dir := t.TempDir()
			root, err := os.OpenRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			if _, err := archive.Unpack(t.Context(), body, root, archive.Options{}); err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(filepath.Join(dir, ".manifest")); err != nil || string(b) != "hello" {
				t.Errorf(".manifest = %q, %v", b, err)
			}
		})
	}
}

func TestPayloadRefuses(t *testing.T) {
	t.Parallel()
	gz := string(payload(t, archive.Gzip))
	rows := []struct{ name, file string }{
		{"empty", ""},
		{"no script", gz},
		{"no skip line", script("skip=many", 40) + gz},
		{"ends in its script", script("skip=100", 40)},
		{"skip before itself", script("skip=1", 40) + gz},
		{"skip too early", script("skip=20", 40) + gz},
		{"skip too late", script("skip=42", 40) + gz + "\n\n\n"},
		{"no payload", script("skip=41", 40)},
		{"payload is text", script("skip=41", 40) + strings.Repeat("text\n", 200)},
		{"too many lines", script("skip=999999", 4) + strings.Repeat("\n", 30_000)},
		{"line without end", "#!" + strings.Repeat("x", 5<<20)},
	}
	for _, r := range rows {
		if _, _, err := runfile.Payload(strings.NewReader(r.file)); !fault.Is(err, fault.Unverified) ||
			fault.Hint(err) == "" {
			t.Errorf("%s: Payload = %v, hint %q; want an unverified error with a hint", r.name, err, fault.Hint(err))
		}
	}
}

// TestPayloadOfMakeself reads runfiles that the program makeself packed. NVIDIA packs its runfiles with makeself.
func TestPayloadOfMakeself(t *testing.T) {
	t.Parallel()
	tool := installed.Program(t, "makeself")
	for _, how := range []string{"--gzip", "--xz", "--zstd"} {
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, "in"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "in", "run"), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), tool, "--quiet", how, "--nox11", "in", "out.run", "label", "./run")
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("makeself %s: %v: %s", how, err, out)
		}
		file, err := os.Open(filepath.Join(dir, "out.run"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		body, _, err := runfile.Payload(file)
		if err != nil {
			t.Errorf("%s: %v", how, err)
			continue
		}
		root, err := os.OpenRoot(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		if _, err := archive.Unpack(t.Context(), body, root, archive.Options{}); err != nil {
			t.Errorf("%s: %v", how, err)
		}
		if fi, err := root.Stat("run"); err != nil || fi.Mode()&0o100 == 0 {
			t.Errorf("%s: run: %v, %v", how, fi, err)
		}
	}
}

const manifestText = `NVIDIA Accelerated Graphics Driver for Linux-x86_64
535.261.03
nvidia
kernel
nvidia nvidia-uvm
label
installer
x86_64
libcuda.so.535.261.03 0755 CUDA_LIB NATIVE ./ MODULE:cuda
32/libcuda.so.535.261.03 0755 CUDA_LIB COMPAT32 / MODULE:cuda
libcuda.so.1 0000 CUDA_SYMLINK NATIVE ./ libcuda.so.535.261.03 MODULE:cuda
libGLX_nvidia.so.535.261.03 0755 GLX_CLIENT_LIB NATIVE GLVND
libGL.so.535.261.03 0755 GLX_CLIENT_LIB NATIVE NON_GLVND MODULE:opengl
libGLX_nvidia.so.0 0000 GLX_CLIENT_SYMLINK NATIVE libGLX_nvidia.so.535.261.03 GLVND
tls/libnvidia-tls.so.535.261.03 0755 TLS_LIB NATIVE tls
nvidia-smi 0755 UTILITY_BINARY
nvidia_icd.json 0644 VULKAN_ICD_JSON icd.d/ MODULE:vulkan
nvidia_layers.json 0644 VULKAN_ICD_JSON implicit_layer.d/
old_icd.json 0644 VULKAN_ICD_JSON
html/a b.html 0644 DOCUMENTATION ./
nvidia-modprobe 4755 NVIDIA_MODPROBE bin/
kernel/nvidia/nv.c 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:proprietary
firmware/gsp_tu10x.bin 0644 FIRMWARE

x 0000 GBM_BACKEND_LIB_SYMLINK NATIVE ../libnvidia-allocator.so
y 0000 GBM_BACKEND_LIB_SYMLINK NATIVE ../libnvidia-allocator.so
`

func TestParseManifest(t *testing.T) {
	t.Parallel()
	got, err := runfile.ParseManifest(strings.NewReader(manifestText))
	if err != nil {
		t.Fatal(err)
	}
	want := &runfile.Manifest{
		Product: "NVIDIA Accelerated Graphics Driver for Linux-x86_64", Version: "535.261.03",
		Settings: []string{"nvidia", "kernel", "nvidia nvidia-uvm", "label", "installer", "x86_64"},
		Entries: []runfile.Entry{
			{Path: "libcuda.so.535.261.03", Mode: 0o755, Type: "CUDA_LIB", Module: "cuda"},
			{Path: "32/libcuda.so.535.261.03", Mode: 0o755, Type: "CUDA_LIB", Compat32: true, Module: "cuda"},
			{Path: "libcuda.so.1", Type: "CUDA_SYMLINK", Target: "libcuda.so.535.261.03", Module: "cuda"},
			{Path: "libGLX_nvidia.so.535.261.03", Mode: 0o755, Type: "GLX_CLIENT_LIB"},
			{Path: "libGL.so.535.261.03", Mode: 0o755, Type: "GLX_CLIENT_LIB", NonGLVND: true, Module: "opengl"},
			{Path: "libGLX_nvidia.so.0", Type: "GLX_CLIENT_SYMLINK", Target: "libGLX_nvidia.so.535.261.03"},
			{Path: "tls/libnvidia-tls.so.535.261.03", Mode: 0o755, Type: "TLS_LIB", Subdir: "tls"},
			{Path: "nvidia-smi", Mode: 0o755, Type: "UTILITY_BINARY"},
			{Path: "nvidia_icd.json", Mode: 0o644, Type: "VULKAN_ICD_JSON", Subdir: "icd.d", Module: "vulkan"},
			{Path: "nvidia_layers.json", Mode: 0o644, Type: "VULKAN_ICD_JSON", Subdir: "implicit_layer.d"},
			{Path: "old_icd.json", Mode: 0o644, Type: "VULKAN_ICD_JSON"},
			{Path: "html/a b.html", Mode: 0o644, Type: "DOCUMENTATION"},
			{Path: "nvidia-modprobe", Mode: 0o755, Type: "NVIDIA_MODPROBE", Subdir: "bin"},
			{Path: "kernel/nvidia/nv.c", Mode: 0o644, Type: "KERNEL_MODULE_SRC", Subdir: "nvidia", Module: "proprietary"},
			{Path: "firmware/gsp_tu10x.bin", Mode: 0o644, Type: "FIRMWARE"},
		},
		Unknown: map[string]int{"GBM_BACKEND_LIB_SYMLINK": 2},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("manifest (-want +got):\n%s", diff)
	}
}

func TestParseManifestRefuses(t *testing.T) {
	t.Parallel()
	head := strings.Repeat("x\n", 8)
	rows := []struct{ name, text string }{
		{"empty", ""},
		{"header only in part", strings.Repeat("x\n", 7)},
		{"no type", head + "libcuda.so 0755\n"},
		{"bad mode", head + "libcuda.so rwx CUDA_LIB NATIVE ./\n"},
		{"mode over 12 bits", head + "libcuda.so 77777 CUDA_LIB NATIVE ./\n"},
		{"no class", head + "libcuda.so 0755 CUDA_LIB\n"},
		{"unknown class", head + "libcuda.so 0755 CUDA_LIB ALIEN ./\n"},
		{"no subdir", head + "libcuda.so 0755 CUDA_LIB NATIVE\n"},
		{"no target", head + "libcuda.so 0000 CUDA_SYMLINK NATIVE ./\n"},
		{"absolute path", head + "/etc/passwd 0755 UTILITY_BINARY\n"},
		{"path out", head + "a/../../b 0755 UTILITY_BINARY\n"},
		{"target out", head + "a 0000 UTILITY_BIN_SYMLINK ../../bin/sh\n"},
		{"subdir out", head + "a 0755 CUDA_LIB NATIVE ../..\n"},
		{"line too long", head + strings.Repeat("x", 10_000) + "\n"},
		{"too long", head + strings.Repeat("a 0755 UTILITY_BINARY\n", 60_000)},
	}
	for _, r := range rows {
		if _, err := runfile.ParseManifest(strings.NewReader(r.text)); !fault.Is(err, fault.Unverified) {
			t.Errorf("%s: ParseManifest = %v; want an unverified error", r.name, err)
		}
	}
}

func FuzzPayload(f *testing.F) {
	for _, format := range []archive.Format{archive.Gzip, archive.XZ, archive.Zstd} {
		f.Add(append([]byte(script("skip=41", 40)), payload(f, format)...))
		f.Add(append([]byte(script(`skip="40"`, 40)), payload(f, format)...))
	}
	f.Add([]byte("#!/bin/sh\nskip=3\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 256<<10 {
			t.Skip("input over 256 KiB")
		}
		body, h, err := runfile.Payload(bytes.NewReader(data))
		if err != nil {
			return
		}
		rest, err := io.ReadAll(body)
		if err != nil || !bytes.Equal(rest, data[h.Offset:]) {
			t.Errorf("payload is %d bytes, %v; want the %d after offset %d", len(rest), err, len(data)-int(h.Offset), h.Offset)
		}
		if got := archive.Detect(rest); got != h.Format || got == "" {
			t.Errorf("payload is %q; header says %q", got, h.Format)
		}
	})
}

func FuzzParseManifest(f *testing.F) {
	f.Add(manifestText)
	f.Add(strings.Repeat("x\n", 8) + "a 0000 UTILITY_BIN_SYMLINK b\n")
	f.Add(strings.Repeat("\n", 8) + "d/e/f 0644 DOCUMENTATION INHERIT_PATH_DEPTH:1 MODULE:x\n")
	f.Fuzz(func(t *testing.T, text string) {
		m, err := runfile.ParseManifest(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, e := range m.Entries {
			for _, p := range []string{e.Path, e.Subdir, e.Target} {
				if p != "" && !filepath.IsLocal(p) {
					t.Errorf("entry %+v has a path that leads out of the archive", e)
				}
			}
			if e.Mode&^0o777 != 0 {
				t.Errorf("entry %+v has mode bits beyond permissions", e)
			}
		}
	})
}
