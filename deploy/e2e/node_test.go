package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm"
)

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

// flavourSteps returns the steps of a node that has a driver already. argv is the command on the page of the
// proprietary flavour. The node then asks again, and changes to the open flavour.
func flavourSteps(argv []string) []vm.Step {
	install := func(name, flavour string) vm.Step {
		step := testbed.InstallStep(shared.srv, "--driver", shared.driver(), "--flavour", flavour)
		step.Name = name
		return step
	}
	modules := func(name string) vm.Step {
		return vm.Step{Name: name, Argv: []string{"@cat", "/proc/modules"}, KeepGoing: true}
	}
	return []vm.Step{
		{Name: "page", KeepGoing: true, Timeout: 8 * time.Minute, Argv: append(argv, "--output", "json")},
		modules("modules 1"),
		install("again", "proprietary"),
		install("change", "open"), modules("modules 2"),
		{Name: "status", Argv: []string{"/usr/bin/fetcher", "status", "--install-dir", testbed.InstallDir}, KeepGoing: true},
	}
}

// checkFlavours checks the results of flavourSteps. The step install came before them, and installed either flavour.
func checkFlavours(t *testing.T, res *vm.Result, proprietary, open string) {
	t.Helper()
	reports := map[string]testbed.Report{}
	for _, name := range []string{"install", "page", "again", "change"} {
		var r testbed.Report
		step := stepNamed(t, res, name)
		t.Logf("%s: exit %d, %.1f s\n%s%s", name, step.ExitCode, step.Seconds, step.Stdout, step.Stderr)
		if err := testbed.Decode(step, &r); err != nil {
			t.Fatal(err)
		}
		if want := fault.Unusable.ExitCode(); step.ExitCode != want {
			t.Errorf("%s: exit code %d; want %d: the emulated GPU is present but not usable", name, step.ExitCode, want)
		}
		if r.Verdict.NVML.Version != shared.driver() || r.Verdict.PCIGPUs != 1 || r.Verdict.UsableGPUs != 0 {
			t.Errorf("%s: verdict %+v; want NVML %s, one GPU on PCI, none usable", name, r.Verdict, shared.driver())
		}
		reports[name] = r
	}
	first, page, again, change := reports["install"], reports["page"], reports["again"], reports["change"]
	if page.Verdict.Digest != proprietary || change.Verdict.Digest != open {
		t.Errorf("installed %s then %s; want %s then %s", page.Verdict.Digest, change.Verdict.Digest, proprietary, open)
	}
	both := first.Verdict.Digest == open // and so the node changed its flavour twice
	if !first.Changed || page.Changed != both || again.Changed || again.FetchedBytes != 0 || !change.Changed {
		t.Errorf("changed: %v, %v, %v (%d bytes), %v; want true, %v, false (0 bytes), true", first.Changed, page.Changed,
			again.Changed, again.FetchedBytes, change.Changed, both)
	}
	// The flavours differ only in the modules, so the node fetches only the modules layer, at the first change.
	digest, fetched := open, change.FetchedBytes
	if both {
		digest, fetched = proprietary, page.FetchedBytes
	}
	if want := layer(t, manifest(t, shared.srv, digest), bundle.LayerModules).Size; fetched != want {
		t.Errorf("changing the flavour fetched %d bytes; want the modules layer alone, %d", fetched, want)
	}
	for _, name := range []string{"modules 1", "modules 2"} {
		live := testbed.Live(stepNamed(t, res, name).Stdout)
		for _, want := range []string{"nvidia", "nvidia-uvm", "nvidia-modeset"} {
			if !slices.Contains(live, want) {
				t.Errorf("%s: %v lacks %s", name, live, want)
			}
		}
	}
	if status := stepNamed(t, res, "status"); !strings.Contains(string(status.Stdout), shared.driver()) {
		t.Errorf("status = %d, %s%s; want driver %s", status.ExitCode, status.Stdout, status.Stderr, shared.driver())
	}
}

// nodeRoot makes a folder that looks like a COS node's root to the fetcher.
func nodeRoot(t *testing.T, k target.Kernel) string {
	t.Helper()
	root := t.TempDir()
	if err := testbed.NodeRoot(root, k); err != nil {
		t.Fatal(err)
	}
	return root
}

// TestNodeRefusesFlippedByte changes one byte in the registry's copy of an artifact. The node must refuse it, and keep
// its former driver.
func TestNodeRefusesFlippedByte(t *testing.T) {
	k := shared.kernel(1)
	good := mustBuild(t, shared.srv, k, shared.driver(), target.Proprietary)
	bad := mustBuild(t, shared.srv, k, shared.driver(), target.Open)
	root := nodeRoot(t, k)
	install := func(flavour target.Flavour) *testbed.Result {
		res, err := shared.Run(t.Context(), "fetcher", "install", "--server", "http://"+shared.srv.Addr, "--host-root", root,
			"--key", shared.key+".pub",
			"--driver", shared.driver(), "--flavour", string(flavour), "--no-load", "--builder", "never", "--output", "json")
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	if res := install(target.Proprietary); res.Code != 0 {
		t.Fatalf("install: exit code %d: %s", res.Code, res.Stderr)
	}
	folder := filepath.Join(root, testbed.InstallDir)
	ko := filepath.Join(folder, "drivers", "nvidia.ko")
	before, err := os.ReadFile(ko)
	if err != nil {
		t.Fatal(err)
	}
	l := layer(t, manifest(t, shared.srv, bad.Digest), bundle.LayerModules)
	blob := findFile(t, shared.srv.Data, l.Digest.Hex)
	flip(t, blob)
	defer flip(t, blob)
	res := install(target.Open)
	if want := fault.Unverified.ExitCode(); res.Code != want {
		t.Errorf("flipped byte: exit code %d: %s; want %d", res.Code, res.Stderr, want)
	}
	after, err := os.ReadFile(ko)
	if err != nil || string(after) != string(before) {
		t.Errorf("after the refusal %s is another file (%v)", ko, err)
	}
	if left := findFiles(t, folder, l.Digest.Hex); len(left) != 0 {
		t.Errorf("the refused layer left %v", left)
	}
	if !strings.Contains(string(res.Stderr), l.Digest.Hex[:12]) {
		t.Errorf("error %q does not name the layer %s", res.Stderr, l.Digest)
	}
	t.Logf("kept %s, refused %s: %s", good.Digest, bad.Digest, res.Stderr)
}

func flip(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, 4096); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, 4096); err != nil {
		t.Fatal(err)
	}
}

func findFiles(t *testing.T, dir, part string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && strings.Contains(d.Name(), part) {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func findFile(t *testing.T, dir, part string) string {
	t.Helper()
	for _, path := range findFiles(t, dir, part) {
		if info, err := os.Stat(path); err == nil && info.Size() > 1<<20 {
			return path
		}
	}
	t.Fatalf("%s holds no large file with %s in its name", dir, part)
	return ""
}

// TestNodeCompilesLocally checks that a node without a matching artifact compiles the driver itself, with the program
// builder, and trusts its own result. The server has no artifact.
func TestNodeCompilesLocally(t *testing.T) {
	k := shared.kernel(1)
	mustBuild(t, shared.srv, k, shared.driver(), target.Proprietary) // fills the shared build cache with the modules
	dir := t.TempDir()
	s, err := testbed.New(shared.Bin, dir, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := s.StartServer(t.Context(), filepath.Join(dir, "server"), shared.mirror)
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Stop()
	root := nodeRoot(t, k)
	t.Setenv("PREBAKE_CACHE", shared.BuildCache())
	res, err := s.Run(t.Context(), "fetcher", "install", "--server", "http://"+srv.Addr, "--host-root", root, "--key",
		shared.key+".pub",
		"--driver", shared.driver(), "--flavour", "proprietary", "--no-load", "--builder", s.Program("builder"),
		"--kernel-mirror", shared.mirror.KernelURL(), "--driver-mirror", shared.mirror.DriverURL(), "--output", "json")
	if err != nil {
		t.Fatal(err)
	}
	if res.Code != 0 {
		t.Fatalf("install: exit code %d\n%s%s", res.Code, res.Stdout, res.Stderr)
	}
	if _, err := os.Stat(filepath.Join(root, testbed.InstallDir, "drivers", "nvidia.ko")); err != nil {
		t.Error(err)
	}
}
