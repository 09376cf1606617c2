package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/cluster"
	"github.com/prebake/prebake/pkg/testkit/gcs"
	"github.com/prebake/prebake/pkg/testkit/gotest"
)

// cosign is Sigstore's program that verifies signatures, in a version that compiles with the Go version of go.mod.
const cosign = "github.com/sigstore/cosign/v3/cmd/cosign@v3.0.6"

// fulcio is Sigstore's certificate authority.
const fulcio = "github.com/sigstore/fulcio@v1.8.8"

// Registry clients that Debian does not package.
const (
	oras   = "oras.land/oras/cmd/oras@v1.3.6"
	regctl = "github.com/regclient/regclient/cmd/regctl@v0.11.7"
)

// takes has how long the longest parts take on two processors, in seconds. Longer parts start first.
var takes = map[string]int{
	"power cuts": 140, "sandbox under control groups": 110, "mirror twice": 100, "faults while a machine runs": 90,
	"kernel inputs": 40, "the gate": 40, "clusters and registry clients": 40, "a cluster's API server": 35,
	"virtual machine": 30, "load test": 30, "same bytes with caches and without": 25,
}

// dependOn maps the slowest rows of TestPartsOnRealInputs to the folders that they depend on, besides those in always.
// If nothing has changed there, such a row does not run again. Other rows always run.
var dependOn = map[string][]string{
	"kernel inputs": {"builder", "deploy/tool.sh"}, "driver inputs": {"builder"}, "mirror twice": {},
	"same bytes with caches and without": {"builder"}, "module signatures": {"builder"}, "the gate": {"builder"},
	"questions of all drivers":     {"builder"},
	"sandbox under control groups": {}, "virtual machine": {}, "load test": {"builder", "server", "fetcher"},
	"faults while a machine runs": {"builder", "fetcher"}, "power cuts": {"fetcher"},
	"a cluster's API server":        {"server", "fetcher", "deploy"},
	"clusters and registry clients": {"server", "fetcher", "deploy"},
}

// TestPartsOnRealInputs runs those tests of other packages that need a real kernel, a real driver or another project's
// program. Here all of these exist, so no test may be skipped.
func TestPartsOnRealInputs(t *testing.T) {
	t.Parallel()
	// The longest parts wait for this function, so it comes first.
	end := shared.turns.take(1000)
	defer end()
	k := shared.kernel(1)
	mustBuild(t, shared.srv, k, shared.driver(), target.Proprietary)
	boot, err := shared.Boot(t.Context(), shared.mirror, k)
	if err != nil {
		t.Fatal(err)
	}
	root := nodeRoot(t, k)
	if _, err := shared.Must(t.Context(), "fetcher", "install", "--server", "http://"+shared.srv.Addr, "--host-root", root,
		"--key", shared.key+".pub",
		"--driver", shared.driver(), "--flavour", "proprietary", "--no-load", "--builder", "never", "--output",
		"json"); err != nil {
		t.Fatal(err)
	}
	driver := filepath.Join(root, testbed.InstallDir)
	own := modulesWithSymvers(t, driver, k)
	sibling := modulesWithSymvers(t, driver, shared.kernel(0))
	mirror := "PREBAKE_MIRROR=file://" + shared.mirror.Dir
	packages := "PREBAKE_MIRROR_CACHE=" + filepath.Join(shared.State, "packages")
	references := "PREBAKE_REFERENCES=" + filepath.Join(shared.State, "references")
	tools := "PATH=" + stockTools(t) + ":" + os.Getenv("PATH")
	emulator := gcs.Env + "=" + tool(t, gcs.Tool)
	twin, of := shared.twin(t)
	// With PREBAKE_FILLED, TestRealSameBytes needs a cache that has the cells already. The build of this cell fills the
	// cache.
	mustBuild(t, shared.srv, twin, shared.driver(), target.Proprietary)
	cells := fmt.Sprintf("PREBAKE_CELLS=%s/%s =%s/%s", of.BuildID, shared.driver(), twin.BuildID, shared.driver())

	filled := "PREBAKE_FILLED=" + shared.BuildCache()
	probe, err := filepath.Abs("../../bin/nvmlprobe")
	if err != nil {
		t.Fatal(err)
	}
	carriers := ""
	if os.Geteuid() == 0 {
		carriers = "|TestCarriers" // containerd runs as root only
	}

	rows := []struct {
		name, pkg, run string
		env            []string
	}{
		// From a folder, and out of an emulated bucket.
		{"kernel inputs", "./builder/internal/cossrc", "TestMirror|TestEmulator", []string{emulator, mirror}},
		{"driver inputs", "./builder/internal/nvsrc", "TestMirror", []string{mirror}},
		{"mirror twice", "./deploy/internal/mirror", "TestReal", []string{packages}},
		{"same bytes with caches and without", "./builder/internal/compile", "TestRealSameBytes",
			[]string{mirror, cells, references, filled}},
		{"questions of all drivers", "./builder/internal/conftest", "TestRealPlans", []string{mirror, filled}},
		{"the gate", "./builder/internal/modcheck", "TestReal", []string{mirror}},
		{"module signatures", "./builder/internal/modsign", "TestLive|TestSignFile|TestOpenSSL",
			[]string{"PREBAKE_BOOT=" + boot, packages}},
		{"sandbox under control groups", "./pkg/sandbox", "TestInVirtualMachine", []string{"PREBAKE_BOOT=" + boot}},
		{"emulated buckets", "./pkg/testkit/gcs ./pkg/cosbucket ./pkg/registry ./builder/internal/licence",
			"GCS|Emulator|Buckets", []string{emulator}},
		// The pattern leaves out TestXattr, which needs root.
		{"tarballs in an emulated bucket", "./builder/internal/tarball", "Test[^X]", []string{emulator, tools}},
		{"modules against their kernel", "./pkg/modinfo", "TestRealModules",
			[]string{"PREBAKE_MODULES=" + own, "PREBAKE_MODULES_RELEASE=" + k.Release}},
		{"modules against a sibling kernel", "./pkg/modinfo", "TestRealModules",
			[]string{"PREBAKE_MODULES=" + sibling, "PREBAKE_MODULES_WANT=checksum"}},
		{"virtual machine", "./pkg/vm", "Boot", []string{"PREBAKE_BOOT=" + boot}},
		{"power cuts", "./fetcher/internal/agent", "TestPowerCut", []string{"PREBAKE_BOOT=" + boot}},
		{"load test", "./builder/internal/loadtest", "Live", []string{"PREBAKE_BOOT=" + boot, "PREBAKE_DRIVER=" + driver}},
		{"faults while a machine runs", "./builder/internal/pipeline", "TestMachine", []string{mirror}},
		{"NVIDIA's CUDA library", "./fetcher/internal/gpucheck", "TestRealCUDA",
			[]string{"PREBAKE_CUDA_PROBE=" + probe, "PREBAKE_CUDA=" + filepath.Join(driver, "lib64/libcuda.so.1")}},
		// The pattern leaves out the tests TestGPU…, which need a GPU.
		{"a cluster's API server", "./fetcher/internal/kube ./server/internal/auth", "Test[^G]",
			[]string{cluster.Env + "=" + script(t, "deploy/kubernetes.sh")}},
		// The components on a cluster, and stock clients of the server's registry.
		{"clusters and registry clients", "./deploy", "TestCluster|TestRemovePage|TestStockClients|Overlay" + carriers,
			[]string{cluster.Env + "=" + script(t, "deploy/kubernetes.sh"), tools}},
		{"offline bundles in stock programs", "./builder/internal/offline", "TestStockTools", []string{tools}},
		{"a release's signature in cosign", "./builder/release", "TestCosign", []string{tools}},
		{"stock tools", "./builder/internal/publish", "Cosign|Crane|VerifyPage", []string{tools}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			if folders, ok := dependOn[row.name]; ok && shared.passes.remembered(t, folders...) {
				return
			}
			defer shared.turns.take(takes[row.name])()
			cmd := exec.CommandContext(t.Context(), "go",
				append([]string{"test", "-v", "-count=1", "-timeout=30m", "-run", row.run}, strings.Fields(row.pkg)...)...)
			cmd.Dir = "../.."
			cmd.Env = append(os.Environ(), row.env...)
			out, err := cmd.CombinedOutput()
			if err := gotest.Check(out, err); err != nil {
				t.Errorf("go test -run %s %s: %v\n%s", row.run, row.pkg, err, out)
			}
		})
	}
}

// modulesWithSymvers returns a folder with the modules of a driver and the Module.symvers of a kernel.
func modulesWithSymvers(t *testing.T, driver string, k target.Kernel) string {
	t.Helper()
	headers, dir := t.TempDir(), t.TempDir()
	if _, err := archive.UnpackFile(t.Context(),
		filepath.Join(shared.mirror.Dir, "cos", k.BuildID, k.Board, "kernel-headers.tgz"), headers,
		archive.Options{}); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(driver, "drivers", "*.ko"))
	if err != nil || len(files) == 0 {
		t.Fatalf("modules in %s: %v, %v", driver, files, err)
	}
	for _, f := range append(files, filepath.Join(headers, "usr/src/linux-headers-"+k.Release, "Module.symvers")) {
		copyTo(t, filepath.Join(dir, filepath.Base(f)), f)
	}
	return dir
}

func copyTo(t *testing.T, dst, src string) {
	t.Helper()
	in, err := os.Open(src)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(dst)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Close()); err != nil {
		t.Fatal(err)
	}
}

// tool builds a program of a pinned version, unless it is built already, and returns its path.
func tool(t *testing.T, name string) string {
	t.Helper()
	return script(t, "deploy/tool.sh", name)
}

// script runs a script of the repository, and returns its output.
func script(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir, cmd.Stderr = "../..", os.Stderr
	path, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(path))
}

// stockTools returns a folder with crane, cosign, fulcio, oras and regctl.
func stockTools(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	path, err := exec.CommandContext(t.Context(), "go", "tool", "-n", "crane").Output()
	if err != nil {
		t.Fatal(err)
	}
	copyTo(t, filepath.Join(dir, "crane"), strings.TrimSpace(string(path)))
	copyTo(t, filepath.Join(dir, "cosign"), tool(t, cosign))
	copyTo(t, filepath.Join(dir, "fulcio"), tool(t, fulcio))
	copyTo(t, filepath.Join(dir, "oras"), tool(t, oras))
	copyTo(t, filepath.Join(dir, "regctl"), tool(t, regctl))
	for _, name := range []string{"crane", "cosign", "fulcio", "oras", "regctl"} {
		if err := os.Chmod(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
