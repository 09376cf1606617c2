package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm"
)

// offlineBundle is the output of builder bundle create.
type offlineBundle struct {
	Index        string `json:"index"`
	Base         string `json:"base"`
	Size         int64  `json:"size"`
	Bytes        int64  `json:"bytes"`
	LeftOutBytes int64  `json:"leftOutBytes"`
}

// TestAirGap installs a driver from a bundle on a node that never has a network.
//
// Then the node's OS is updated. The second bundle is a delta: it lacks the parts that the node has already. On a node
// without these parts the install fails, and the error names the missing bundle. That node is a folder of this machine,
// and the fetcher runs without a network there too.
func TestAirGap(t *testing.T) {
	t.Parallel()
	if shared.passes.remembered(t, "builder", "server", "fetcher") {
		return
	}
	defer shared.turns.take(60)()
	before, k := shared.kernel(0), shared.kernel(1)
	first := mustBuild(t, shared.srv, before, shared.driver(), target.Proprietary)
	second := mustBuild(t, shared.srv, k, shared.driver(), target.Proprietary)
	dir := t.TempDir()
	create := func(name string, k target.Kernel, more ...string) (made offlineBundle) {
		t.Helper()
		out, err := shared.Must(t.Context(), "builder", append([]string{
			"bundle", "create", filepath.Join(dir, name), "--from", shared.srv.Repository(), "--kernel", k.String(), "--driver",
			shared.driver(),
			"--flavour", string(target.Proprietary), "--public-key", shared.key + ".pub", "--output", "json",
		}, more...)...)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(out, &made); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d bytes, holds %d, leaves out %d", name, made.Size, made.Bytes, made.LeftOutBytes)
		return made
	}
	base := create("base.tar", before)
	delta := create("delta.tar", k, "--since", filepath.Join(dir, "base.tar"))
	m := manifest(t, shared.srv, second.Digest)
	rest := layer(t, m, bundle.LayerUserspace).Size + layer(t, m, bundle.LayerFirmware).Size
	if delta.Base != base.Index || delta.LeftOutBytes < rest || base.Size-delta.Size < rest/2 {
		t.Errorf("the bundles are %+v and %+v; want a delta of the first, without the %d bytes that both kernels share", base,
			delta, rest)
	}

	checkDelta(t, k, dir, base.Index)
	// The disk is mounted at the parent folder of the install folder.
	mount := filepath.Dir(testbed.InstallDir)
	disk := diskWith(t, dir)
	install := func(name, ref, folder string, more ...string) vm.Step {
		return vm.Step{Name: name, KeepGoing: true, Timeout: 8 * time.Minute, Argv: append([]string{
			"/usr/bin/fetcher", "install", "--registry", ref, "--driver", shared.driver(), "--flavour", "proprietary",
			"--install-dir", folder, "--builder", "never", "--output", "json",
		}, more...)}
	}
	port := shared.srv.Addr[strings.LastIndex(shared.srv.Addr, ":")+1:]
	boot := func(k target.Kernel, steps ...vm.Step) *vm.Result {
		t.Helper()
		folder, err := shared.Boot(t.Context(), shared.mirror, k)
		if err != nil {
			t.Fatal(err)
		}
		res, err := shared.RunNode(t.Context(),
			testbed.Node{Kernel: k, Boot: folder, GPU: true, Offline: true, Key: shared.key + ".pub", Disk: disk,
				Timeout: 20 * time.Minute},
			append([]vm.Step{
				{Name: "mount", Argv: []string{"@mount", "/dev/vda", mount}},
				{Name: "dial", Argv: []string{"@dial", vm.HostAddress + ":" + port}, KeepGoing: true},
			}, steps...))
		if err != nil {
			t.Fatal(err)
		}
		if step := stepNamed(t, res, "dial"); step.ExitCode == 0 {
			t.Fatal("the node reaches the farm; want it to have no network")
		}
		return res
	}
	baseRef, deltaRef := "oci-archive:"+mount+"/base.tar", "oci-archive:"+mount+"/delta.tar"
	res := boot(before, install("install", baseRef, testbed.InstallDir), testbed.ModulesStep())
	checkInstalled(t, res, "install", first.Digest)
	if live := testbed.Live(stepNamed(t, res, testbed.ModulesStep().Name).Stdout); !slices.Contains(live, "nvidia") {
		t.Errorf("live in the node: %v; want nvidia among them", live)
	}

	res = boot(k,
		install("upgrade", deltaRef, testbed.InstallDir), testbed.ModulesStep())
	r := checkInstalled(t, res, "upgrade", second.Digest)
	if most := layer(t, m, bundle.LayerModules).Size; r.FetchedBytes > most {
		t.Errorf("the upgrade read %d bytes of the delta; want the modules at most, %d", r.FetchedBytes, most)
	}
	if live := testbed.Live(stepNamed(t, res, testbed.ModulesStep().Name).Stdout); !slices.Contains(live, "nvidia") {
		t.Errorf("live after the upgrade: %v; want nvidia among them", live)
	}
}

// checkDelta installs the bundles in a folder on a node that has no driver. unshare runs the fetcher in a network
// namespace of its own, which has no interface that is up.
func checkDelta(t *testing.T, k target.Kernel, dir, missing string) {
	t.Helper()
	root := nodeRoot(t, k)
	install := func(ref string) (code int, out string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "unshare", "--map-root-user", "--net", shared.Program("fetcher"), "install",
			"--registry", "oci-archive:"+ref, "--driver", shared.driver(), "--flavour", string(target.Proprietary),
			"--host-root", root, "--key", shared.key+".pub", "--no-load", "--builder", "never")
		text, err := cmd.CombinedOutput()
		if err != nil && cmd.ProcessState == nil {
			t.Fatalf("%v: %v", cmd.Args, err)
		}
		return cmd.ProcessState.ExitCode(), string(text)
	}
	delta := filepath.Join(dir, "delta.tar")
	if code, out := install(delta); code != fault.Usage.ExitCode() || !strings.Contains(out, missing) {
		t.Errorf("install of the delta alone on a new node = %d: %s\nwant %d, and the bundle that it needs: %s", code, out,
			fault.Usage.ExitCode(), missing)
	}
	if code, out := install(filepath.Join(dir, "base.tar") + "+" + delta); code != 0 {
		t.Errorf("install of both bundles on a new node = %d: %s; want 0", code, out)
	}
}

// checkInstalled checks an install: this artifact is active, and the emulated GPU is unusable.
func checkInstalled(t *testing.T, res *vm.Result, name, digest string) (r testbed.Report) {
	t.Helper()
	step := stepNamed(t, res, name)
	t.Logf("%s: exit %d, %.1f s\n%s%s", name, step.ExitCode, step.Seconds, step.Stdout, step.Stderr)
	if err := testbed.Decode(step, &r); err != nil {
		t.Fatal(err)
	}
	if want := fault.Unusable.ExitCode(); step.ExitCode != want || r.Verdict.Digest != digest ||
		r.Verdict.NVML.Version != shared.driver() || !r.Changed {
		t.Errorf("%s: exit code %d, %+v; want %d, and %s with NVML %s", name, step.ExitCode, r.Verdict, want, digest,
			shared.driver())
	}
	return r
}

func stepNamed(t *testing.T, res *vm.Result, name string) vm.StepResult {
	t.Helper()
	step, err := testbed.StepNamed(res, name)
	if err != nil {
		t.Fatal(err)
	}
	return step
}

// diskWith makes an ext4 image with the files of a folder.
func diskWith(t *testing.T, dir string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(image)
	if err == nil {
		err = errors.Join(f.Truncate(3<<30), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "mke2fs", "-q", "-F", "-t", "ext4", "-d", dir,
		image).CombinedOutput(); err != nil {
		t.Fatal(fmt.Errorf("make filesystem: %w: %s", err, out))
	}
	return image
}
