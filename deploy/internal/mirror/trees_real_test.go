package mirror

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/target"
)

// TestTrees lets the builder build the open flavour of drivers that Debian does not have, out of a clone of NVIDIA's
// repository open-gpu-kernel-modules. NVIDIA's own tree is in the runfile as it is. Only its two core objects are
// replaced: they have the names that the kernel modules call, and do nothing. So the modules must not be loaded.
//
// For each cell, make must have no question of conftest left, and the modules must be those that make makes alone. If
// two cells differ only in the driver, the second one shows how many objects the releases share.
//
// A cell takes about four minutes, so the test runs only if these variables are set; `make trees` sets them.
// PREBAKE_TREES is the folder of the clone, PREBAKE_TREES_MIRROR a folder with kernels that `mirror` made, and
// PREBAKE_TREES_CELLS a list of SERIES/VERSION, such as 6.12/580.142.
func TestTrees(t *testing.T) {
	clone, kernels, cells := os.Getenv("PREBAKE_TREES"), os.Getenv("PREBAKE_TREES_MIRROR"),
		strings.Fields(os.Getenv("PREBAKE_TREES_CELLS"))
	if clone == "" || kernels == "" || len(cells) == 0 {
		t.Skip("PREBAKE_TREES names no clone of NVIDIA's repository; run make trees TREES=FOLDER")
	}
	dir := t.TempDir()
	mirror, cache, key := filepath.Join(dir, "mirror"), filepath.Join(dir, "cache"), filepath.Join(dir, "key")
	if err := os.CopyFS(filepath.Join(mirror, "cos"), os.DirFS(filepath.Join(kernels, "cos"))); err != nil {
		t.Fatal(err)
	}
	builds := newestBuilds(t, filepath.Join(kernels, "mirror.json"))
	builder := compilePrograms(t, target.AMD64)
	builder(nil, "keygen", key)
	made := map[string]bool{}
	var names []string
	for _, cell := range cells {
		series, version, _ := strings.Cut(cell, "/")
		build, ok := builds[series]
		if !ok {
			t.Fatalf("cell %s: %s has no kernel of the series", cell, kernels)
		}
		if !made[version] {
			made[version] = true
			writeRunfile(t, treeOfRelease(t, clone, version), version, filepath.Join(mirror, "drivers"))
		}
		var report struct{ Digest string }
		builder(&report, "build", "--build-id", build, "--driver", version, "--flavour", string(target.Open), "--load-test",
			"off", "--key", key, "--cache", cache, "--to", "oci:"+filepath.Join(dir, "out"), "--output", "json",
			"--kernel-mirror", "file://"+mirror+"/cos", "--driver-mirror", "file://"+mirror+"/drivers")
		t.Logf("%s: %s", cell, report.Digest)
		names = append(names, build+"/"+version+"-"+string(target.Open))
	}
	cmd := exec.CommandContext(t.Context(), "go", "test", "-v", "-count=1", "-timeout=120m",
		"-run=^(TestRealPlans|TestRealSameBytes)$", "github.com/prebake/prebake/builder/internal/conftest",
		"github.com/prebake/prebake/builder/internal/compile")
	cmd.Env = append(os.Environ(), "PREBAKE_MIRROR=file://"+mirror, "PREBAKE_CELLS="+strings.Join(names, " "),
		"PREBAKE_FILLED="+cache)
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Errorf("questions of the drivers, and same bytes: %v", err)
	}
}

// newestBuilds reads mirror.json and returns the BUILD_ID of the newest kernel of each series.
func newestBuilds(t *testing.T, file string) map[string]string {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var made Result
	if err := json.Unmarshal(raw, &made); err != nil {
		t.Fatal(err)
	}
	builds := map[string]string{}
	for _, b := range made.Builds {
		if b.Note == "" { // builds are in order, and a build with a note is a second one of the same kernel
			builds[strings.Join(strings.SplitN(b.Release, ".", 3)[:2], ".")] = b.BuildID
		}
	}
	return builds
}

// treeOfRelease lays out a release as NVIDIA's runfile does, with kernel-open/ out of a clone of NVIDIA's repository.
// Two small libraries and a text replace the user space and the firmware.
func treeOfRelease(t *testing.T, clone, version string) tree {
	t.Helper()
	files := tree{}
	// The two files are NVIDIA's licence, and the list of the names that nv-kernel.o exports.
	const exports = "src/nvidia/exports_link_command.txt"
	// Of a tree in place of a commit, git writes no extra entry with the commit's name.
	err := pipe(exec.CommandContext(t.Context(), "git", "-C", clone, "archive", version+"^{tree}", "kernel-open",
		"COPYING", exports), func(r io.Reader) error {
		return readTar(files, r, func(name string) string {
			if path.Base(name) == ".gitignore" {
				return ""
			}
			return name
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	files.add("LICENSE", files["COPYING"])
	var core []string
	for line := range strings.Lines(string(files[exports].data)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "--undefined="); ok {
			core = append(core, name)
		}
	}
	for name := range files {
		if name == "COPYING" || strings.HasPrefix(name, "src") {
			delete(files, name)
		}
	}
	files.add("kernel-open/nvidia/nv-kernel.o_binary", node{mode: 0o644, data: coreObject(t, core)})
	files.add("kernel-open/nvidia-modeset/nv-modeset-kernel.o_binary", node{mode: 0o644,
		data: coreObject(t, files.calls("kernel-open/nvidia-modeset", modesetCall))})
	for _, lib := range []string{"libcuda.so", "libnvidia-ml.so"} {
		files.add(lib+"."+version, node{mode: 0o755, data: compileC(t, "int "+strings.NewReplacer(".", "_", "-",
			"_").Replace(lib)+";\n", "-shared", "-Wl,-soname,"+lib+".1")})
	}
	if err := files.addLibraryLinks(version); err != nil {
		t.Fatal(err)
	}
	files.addFile("firmware/gsp_ga10x.bin", "no firmware\n")
	files.addFile("firmware/gsp_tu10x.bin", "no firmware\n")
	files.add("nvidia-installer", node{mode: 0o755, data: []byte(installer)})
	files.addFile(".manifest", manifest(files, "x86_64", version))
	return files
}

// modesetCall matches a call of a function that nv-modeset-kernel.o may have.
var modesetCall = regexp.MustCompile(`\b(nvKms\w+)\(`)

// calls returns the names that a pattern finds in the C files of a folder.
func (t tree) calls(dir string, call *regexp.Regexp) []string {
	var names []string
	for name, n := range t.sub(dir) {
		if path.Ext(name) == ".c" {
			for _, m := range call.FindAllSubmatch(n.data, -1) {
				names = append(names, string(m[1]))
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// coreObject returns an object with functions that do nothing. They are weak, so that a function of the same name in
// the driver's sources takes precedence.
func coreObject(t *testing.T, names []string) []byte {
	t.Helper()
	if len(names) == 0 {
		t.Fatal("the clone has no names for a core object")
	}
	var b strings.Builder
	for _, name := range names {
		fmt.Fprintf(&b, "__attribute__((weak)) int %s(void) { return 0; }\n", name)
	}
	return compileC(t, b.String(), "-c", "-O1", "-ffreestanding", "-fno-pic", "-fcf-protection=none", "-mno-red-zone",
		"-mcmodel=kernel", "-fno-asynchronous-unwind-tables", "-mfunction-return=thunk-extern")
}

// compileC compiles a C text with this machine's gcc, and returns the result.
func compileC(t *testing.T, text string, args ...string) []byte {
	t.Helper()
	file := filepath.Join(t.TempDir(), "out")
	cmd := exec.CommandContext(t.Context(), "gcc", slices.Concat(args, []string{"-x", "c", "-", "-o", file})...)
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// writeRunfile packs a tree into a runfile and writes it to a driver bucket, with its checksum.
func writeRunfile(t *testing.T, from tree, version, bucket string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(bucket, "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	name := cosbucket.RunfileName(version, target.AMD64)
	var file bytes.Buffer
	if err := packRunfile(t.Context(), from, name, version, t.TempDir(), &file); err != nil {
		t.Fatal(err)
	}
	sum := fmt.Sprintf("%x  %s\n", sha256.Sum256(file.Bytes()), name)
	for to, data := range map[string][]byte{name: file.Bytes(), cosbucket.RunfileSumName(version,
		target.AMD64): []byte(sum)} {
		if err := os.WriteFile(filepath.Join(bucket, to), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
