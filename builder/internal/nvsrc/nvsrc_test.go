package nvsrc_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

const version = "535.261.03"

// library returns a small ELF file with a SONAME and no code.
func library(t testing.TB, soname string) string {
	t.Helper()
	strs := "\x00" + soname + "\x00"
	names := "\x00.dynstr\x00.dynamic\x00.shstrtab\x00"
	dynamic := []elf.Dyn64{{Tag: int64(elf.DT_SONAME), Val: 1}, {Tag: int64(elf.DT_NULL)}}
	const ehdr, dyn = 64, 16
	strsAt := uint64(ehdr)
	dynAt := strsAt + uint64(len(strs))
	namesAt := dynAt + dyn*uint64(len(dynamic))
	header := elf.Header64{
		Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Shoff: namesAt + uint64(len(names)), Ehsize: ehdr, Shentsize: 64, Shnum: 4, Shstrndx: 3,
	}
	sections := []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_STRTAB), Off: strsAt, Size: uint64(len(strs)), Addralign: 1},
		{Name: 9, Type: uint32(elf.SHT_DYNAMIC), Off: dynAt, Size: dyn * uint64(len(dynamic)), Link: 1, Entsize: dyn,
			Addralign: 1},
		{Name: 18, Type: uint32(elf.SHT_STRTAB), Off: namesAt, Size: uint64(len(names)), Addralign: 1},
	}
	var b bytes.Buffer
	for _, part := range []any{header, []byte(strs), dynamic, []byte(names), sections} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

const manifest = `NVIDIA Accelerated Graphics Driver for Linux-x86_64
535.261.03
nvidia
kernel
nvidia nvidia-uvm
label
nvidia-installer
x86_64
libcuda.so.535.261.03 0755 CUDA_LIB NATIVE ./
libcuda.so.1 0000 CUDA_SYMLINK NATIVE ./ libcuda.so.535.261.03
libcuda.so 0000 CUDA_SYMLINK NATIVE ./ libcuda.so.1
32/libcuda.so.535.261.03 0755 CUDA_LIB COMPAT32 ./
libnvidia-ml.so.535.261.03 0755 UTILITY_LIB NATIVE
tls/libnvidia-tls.so.535.261.03 0755 TLS_LIB NATIVE tls
libGLX_nvidia.so.535.261.03 0755 GLX_CLIENT_LIB NATIVE GLVND
libGL.so.535.261.03 0755 GLX_CLIENT_LIB NATIVE NON_GLVND
libGL.so.1 0000 GLX_CLIENT_SYMLINK NATIVE libGL.so.535.261.03 GLVND
libnvidia-gtk3.so.535.261.03 0755 UTILITY_LIB NATIVE
libvdpau_nvidia.so.535.261.03 0755 VDPAU_LIB NATIVE vdpau
nvidia-smi 0755 UTILITY_BINARY
nvidia-settings 0755 UTILITY_BINARY
nvidia-modprobe 4755 NVIDIA_MODPROBE bin/
nvidia_icd.json 0644 VULKAN_ICD_JSON icd.d/
nvidia_layers.json 0644 VULKAN_ICD_JSON implicit_layer.d/
10_nvidia.json 0644 GLVND_EGL_ICD_JSON
nvidia.icd 0644 CUDA_ICD
nvidia_drv.so 0755 XMODULE_SHARED_LIB x11
README.txt 0644 DOCUMENTATION ./
kernel/Makefile 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:proprietary
`

// driverFiles returns the files of a small release. A name that ends in * is executable.
func driverFiles(t testing.TB) map[string]string {
	files := map[string]string{
		".manifest":       manifest,
		"kernel/Makefile": "modules:\n", "kernel/Kbuild": "obj-m\n", "kernel/nvidia/nv.c": "int x;\n",
		"kernel-open/Makefile": "modules:\n", "kernel-open/Kbuild": "obj-m\n",
		"firmware/gsp_tu10x.bin": "gsp", "firmware/gsp_ga10x.bin": "gsp2",
		"nvidia-smi*": "ELF", "nvidia-settings*": "ELF", "nvidia-modprobe": "ELF", "README.txt": "read",
		"nvidia_icd.json": "{}", "nvidia_layers.json": "{}", "10_nvidia.json": "{}", "nvidia.icd": "libnvidia-opencl.so.1\n",
		"nvidia_drv.so": "x", "32/libcuda.so." + version: library(t, "libcuda.so.1"),
		"tls/libnvidia-tls.so." + version: library(t, "libnvidia-tls.so."+version),
	}
	for name, soname := range map[string]string{
		"libcuda": "libcuda.so.1", "libnvidia-ml": "libnvidia-ml.so.1", "libGLX_nvidia": "libGLX_nvidia.so.0",
		"libGL":          "libGL.so.1",
		"libnvidia-gtk3": "libnvidia-gtk3.so." + version, "libvdpau_nvidia": "libvdpau_nvidia.so.1",
	} {
		files[name+".so."+version] = library(t, soname)
	}
	return files
}

func runfile(t testing.TB, files map[string]string, xzed bool) []byte {
	t.Helper()
	lines := []string{"#!/bin/sh", `skip="20"`}
	if xzed {
		lines[1] = "skip=21"
	}
	for len(lines) < 20 {
		lines = append(lines, ":")
	}
	b := bytes.NewBufferString(strings.Join(lines, "\n") + "\n")
	var zw io.WriteCloser
	var err error
	if xzed {
		zw, err = xz.NewWriter(b)
	} else {
		zw, err = zstd.NewWriter(b)
	}
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(zw)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Name: "./" + strings.TrimSuffix(name, "*"), Typeflag: tar.TypeReg, Mode: 0o644,
			Size: int64(len(files[name]))}
		if strings.HasSuffix(name, "*") {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), zw.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// writeRunfile writes a runfile and the file with its SHA-256 into dir, which stands for a bucket. If sum is "", the
// second file has the true SHA-256.
func writeRunfile(t testing.TB, dir, version string, file []byte, sum string) {
	t.Helper()
	name := "NVIDIA-Linux-x86_64-" + version + ".run"
	if sum == "" {
		sum = fmt.Sprintf("%x  %s\n", sha256.Sum256(file), name)
	}
	err := errors.Join(
		os.MkdirAll(filepath.Join(dir, "sha256"), 0o755),
		os.WriteFile(filepath.Join(dir, name), file, 0o644),
		os.WriteFile(filepath.Join(dir, "sha256", name+".sha256"), []byte(sum), 0o644))
	if err != nil {
		t.Fatal(err)
	}
}

// openEmpty opens a bucket and a new cache. The test's end closes both.
func openEmpty(t testing.TB, bucketURL string) (*cosbucket.Bucket, *cas.Cache) {
	t.Helper()
	bucket, err := cosbucket.Open(t.Context(), bucketURL)
	if err != nil {
		t.Fatal(err)
	}
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(bucket.Close(), cache.Close()); err != nil {
			t.Error(err)
		}
	})
	return bucket, cache
}

func fetch(t testing.TB, dir, version string) (*nvsrc.Release, []string, error) {
	t.Helper()
	bucket, cache := openEmpty(t, "file://"+dir)
	var said []string
	r, err := nvsrc.Fetch(t.Context(), bucket, cache, version, target.AMD64,
		func(line string) { said = append(said, line) })
	return r, said, err
}

// fetchRunfile writes the runfile into a new mirror, and fetches the driver from this mirror.
func fetchRunfile(t testing.TB, file []byte) *nvsrc.Release {
	t.Helper()
	dir := t.TempDir()
	writeRunfile(t, dir, version, file, "")
	r, _, err := fetch(t, dir, version)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// layout returns the entries of a folder: the mode of a file, or the target of a link.
func layout(t testing.TB, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		what := ""
		if err == nil {
			what = fi.Mode().String()
		}
		if err == nil && d.Type() == fs.ModeSymlink {
			what, err = os.Readlink(file)
		}
		got[file[len(dir)+1:]] = what
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestFetchAndStage(t *testing.T) {
	t.Parallel()
	const lib, data = "-rwxr-xr-x", "-rw-r--r--"
	want := map[string]string{
		"bin/nvidia-modprobe": lib, "bin/nvidia-smi": lib,
		"lib64/libcuda.so": "libcuda.so.1", "lib64/libcuda.so.1": "libcuda.so." + version, "lib64/libcuda.so." + version: lib,
		"lib64/libnvidia-ml.so.1": "libnvidia-ml.so." + version, "lib64/libnvidia-ml.so." + version: lib,
		"lib64/libGLX_nvidia.so.0": "libGLX_nvidia.so." + version, "lib64/libGLX_nvidia.so." + version: lib,
		"lib64/libnvidia-tls.so." + version: lib,
		"share/OpenCL/vendors/nvidia.icd":   data, "share/glvnd/egl_vendor.d/10_nvidia.json": data,
		"vulkan/icd.d/nvidia_icd.json": data, "vulkan/implicit_layer.d/nvidia_layers.json": data,
	}
	for _, xzed := range []bool{false, true} {
		dir := t.TempDir()
		writeRunfile(t, dir, version, runfile(t, driverFiles(t), xzed), "")
		r, said, err := fetch(t, dir, version)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]target.Flavour{target.Proprietary, target.Open}, r.Flavours); diff != "" {
			t.Errorf("flavours (-want +got):\n%s", diff)
		}
		if len(r.Materials) != 1 || r.Materials[0].Digest != r.Digest || r.Materials[0].Unverified {
			t.Errorf("materials %+v, digest %s", r.Materials, r.Digest)
		}
		if !strings.Contains(strings.Join(said, "\n"), "XMODULE_SHARED_LIB") {
			t.Errorf("unknown type is not named in %q", said)
		}
		src, err := r.Source(target.Open)
		if _, serr := os.Stat(filepath.Join(src, "Kbuild")); err != nil || serr != nil ||
			filepath.Base(src) != "kernel-open" {
			t.Errorf("Source(open) = %q, %v, %v", src, err, serr)
		}
		user, firmware := t.TempDir(), t.TempDir()
		if err := errors.Join(r.StageUserspace(user), r.StageFirmware(firmware)); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, layout(t, user)); diff != "" {
			t.Errorf("user space (-want +got):\n%s", diff)
		}
		wantFirmware := map[string]string{"firmware/nvidia/535.261.03/gsp_tu10x.bin": data,
			"firmware/nvidia/535.261.03/gsp_ga10x.bin": data}
		if diff := cmp.Diff(wantFirmware, layout(t, firmware)); diff != "" {
			t.Errorf("firmware (-want +got):\n%s", diff)
		}
	}
}

// TestEdition checks a release with an edition, such as -grid. Only the runfile's name has this suffix. The files
// inside have the plain version.
func TestEdition(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeRunfile(t, dir, version+"-grid", runfile(t, driverFiles(t), false), "")
	r, _, err := fetch(t, dir, version+"-grid")
	if err != nil {
		t.Fatal(err)
	}
	user, firmware := t.TempDir(), t.TempDir()
	if err := errors.Join(r.StageUserspace(user), r.StageFirmware(firmware)); err != nil {
		t.Fatal(err)
	}
	if got := layout(t, user)["lib64/libcuda.so"]; r.Version != version+"-grid" || got != "libcuda.so.1" {
		t.Errorf("release %s, libcuda.so is %q; want a link to libcuda.so.1", r.Version, got)
	}
	if got := layout(t, firmware); got["firmware/nvidia/"+version+"/gsp_tu10x.bin"] == "" {
		t.Errorf("firmware %v; want it where the driver looks for it", got)
	}
	if _, _, err := fetch(t, dir, version); !fault.Is(err, fault.InputMissing) ||
		!strings.Contains(fault.Hint(err), version+"-grid") {
		t.Errorf("the release without its edition: %v, hint %q; want the edition named", err, fault.Hint(err))
	}
}

func TestStageWithoutManifest(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "not a manifest\n"} {
		files := driverFiles(t)
		if files[".manifest"] = text; text == "" {
			delete(files, ".manifest")
		}
		delete(files, "libGL.so."+version) // only the manifest says that this one is for systems without libglvnd
		files["nvidia-modprobe*"] = files["nvidia-modprobe"]
		delete(files, "nvidia-modprobe")
		r := fetchRunfile(t, runfile(t, files, false))
		user := t.TempDir()
		if err := r.StageUserspace(user); err != nil {
			t.Fatal(err)
		}
		got := layout(t, user)
		for name, what := range map[string]string{
			"lib64/libcuda.so": "libcuda.so.1", "lib64/libcuda.so.1": "libcuda.so." + version,
			"lib64/libnvidia-ml.so":   "libnvidia-ml.so.1",
			"lib64/libnvidia-ml.so.1": "libnvidia-ml.so." + version, "bin/nvidia-smi": "-rwxr-xr-x",
			"vulkan/icd.d/nvidia_icd.json": "-rw-r--r--",
		} {
			if got[name] != what {
				t.Errorf("manifest %q: %s = %q; want %q", text, name, got[name], what)
			}
		}
		for name := range got {
			if strings.Contains(name, "gtk") || strings.Contains(name, "settings") || strings.Contains(name, "vdpau") ||
				strings.Contains(name, "_drv") {
				t.Errorf("manifest %q: %s has no place on a compute node", text, name)
			}
		}
	}
}

// TestPlaces checks that Fetch finds a runfile at each location that buckets use, and that the material has its URL.
func TestPlaces(t *testing.T) {
	t.Parallel()
	file := runfile(t, driverFiles(t), false)
	places := cosbucket.RunfileLocations(version, target.AMD64)
	if len(places) != 7 {
		t.Errorf("%d places; want 7", len(places))
	}
	for _, place := range places {
		dir := t.TempDir()
		for name, data := range map[string][]byte{place.Runfile: file,
			place.Sum: fmt.Appendf(nil, "%x  %s\n", sha256.Sum256(file), filepath.Base(place.Runfile))} {
			at := filepath.Join(dir, name)
			if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o755), os.WriteFile(at, data, 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		r, _, err := fetch(t, dir, version)
		if err != nil {
			t.Errorf("%+v: %v", place, err)
			continue
		}
		if want := (&url.URL{Scheme: "file", Path: dir + "/" + place.Runfile}).String(); r.Materials[0].URI != want ||
			r.Materials[0].Unverified {
			t.Errorf("%+v: material %+v; want %s, verified", place, r.Materials[0], want)
		}
	}
}

func TestFetchRefuses(t *testing.T) {
	t.Parallel()
	good := runfile(t, driverFiles(t), false)
	other := driverFiles(t)
	other[".manifest"] = strings.ReplaceAll(manifest, version, "535.309.01")
	bare := driverFiles(t)
	maps.DeleteFunc(bare, func(name, _ string) bool { return strings.HasPrefix(name, "kernel") })
	hole := driverFiles(t)
	delete(hole, "libnvidia-ml.so."+version)
	rows := []struct {
		name string
		lay  func(t *testing.T, dir string)
		ask  string
		kind fault.Kind
		hint string
	}{
		{"unknown version", func(t *testing.T, dir string) {
			writeRunfile(t, dir, "535.309.01", good, "")
			writeRunfile(t, dir, "470.1.1", good, "")
		}, version, fault.InputMissing, "535.309.01, 470.1.1"},
		{"unknown version of a bucket with folders", func(t *testing.T, dir string) {
			writeRunfile(t, filepath.Join(dir, "tesla", "535.309.01"), "535.309.01", good, "")
		}, version, fault.InputMissing, "such as 535.309.01"},
		{"empty bucket", func(*testing.T, string) {}, version, fault.InputMissing, "copy the runfile"},
		{"not a version", func(*testing.T, string) {}, "../x", fault.Usage, "535"},
		{"no sha256", func(t *testing.T, dir string) {
			writeRunfile(t, dir, version, good, "")
			if err := os.RemoveAll(filepath.Join(dir, "sha256")); err != nil {
				t.Fatal(err)
			}
		}, version, fault.InputMissing, "sha256"},
		{"wrong sha256", func(t *testing.T, dir string) {
			writeRunfile(t, dir, version, good, strings.Repeat("0", 64))
		}, version, fault.Checksum, "replace"},
		{"another version inside", func(t *testing.T, dir string) {
			writeRunfile(t, dir, version, runfile(t, other, false), "")
		}, version, fault.Mismatch, "put the runfile of driver"},
		{"no sources", func(t *testing.T, dir string) { writeRunfile(t, dir, version, runfile(t, bare, false), "") }, version,
			fault.Unsupported, "full driver"},
		{"not a runfile", func(t *testing.T, dir string) { writeRunfile(t, dir, version, []byte("<html>"), "") }, version,
			fault.Unverified, ".run file"},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			r.lay(t, dir)
			_, _, err := fetch(t, dir, r.ask)
			if !fault.Is(err, r.kind) || !strings.Contains(fault.Hint(err), r.hint) {
				t.Errorf("Fetch = %v (%v), hint %q; want %v and a hint with %q", err, fault.Of(err), fault.Hint(err), r.kind,
					r.hint)
			}
		})
	}
	t.Run("no such flavour", func(t *testing.T) {
		t.Parallel()
		files := driverFiles(t)
		maps.DeleteFunc(files, func(name, _ string) bool { return strings.HasPrefix(name, "kernel-open/") })
		r := fetchRunfile(t, runfile(t, files, false))
		if _, err := r.Source(target.Open); !fault.Is(err, fault.Unsupported) ||
			fault.Hint(err) != "use --flavour proprietary" {
			t.Errorf("Source(open) = %v, hint %q", err, fault.Hint(err))
		}
	})
	t.Run("manifest names a file that is missing", func(t *testing.T) {
		t.Parallel()
		r := fetchRunfile(t, runfile(t, hole, false))
		if err := r.StageUserspace(t.TempDir()); !fault.Is(err, fault.Unverified) ||
			!strings.Contains(err.Error(), "libnvidia-ml") {
			t.Errorf("StageUserspace = %v; want an unverified error that names the file", err)
		}
	})
	t.Run("SONAME that leads out", func(t *testing.T) {
		t.Parallel()
		files := driverFiles(t)
		files["libcuda.so."+version] = library(t, "../../etc/cron.d/x")
		r := fetchRunfile(t, runfile(t, files, false))
		if err := r.StageUserspace(t.TempDir()); !fault.Is(err, fault.Unverified) ||
			!strings.Contains(err.Error(), "SONAME") {
			t.Errorf("StageUserspace = %v; want a refusal of the SONAME", err)
		}
	})
}

// TestStageIsTheSameForTheSameContent packs the same release in two ways. The staged files must be the same.
func TestStageIsTheSameForTheSameContent(t *testing.T) {
	t.Parallel()
	var digests, sources []string
	for _, xzed := range []bool{false, true} {
		r := fetchRunfile(t, runfile(t, driverFiles(t), xzed))
		user := t.TempDir()
		if err := r.StageUserspace(user); err != nil {
			t.Fatal(err)
		}
		digests, sources = append(digests, digest(t, user)), append(sources, r.SourceDigest)
	}
	if digests[0] != digests[1] || sources[0] != sources[1] {
		t.Errorf("one content, two packings: user space %v, sources %v", digests, sources)
	}
}
