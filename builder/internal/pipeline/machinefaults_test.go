package pipeline_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit/program"
	"github.com/prebake/prebake/pkg/trust"
)

// These are the moments of a load test at which faults happen. At momentBoot the console prints bootText. At
// momentDriver it prints driverText.
const (
	momentStart  = "load test begins"
	momentBoot   = "machine boots"
	momentDriver = "driver loads"
	bootText     = "Linux version "
	driverText   = "NVRM: the stand-in is loading"
)

var moments = []string{momentStart, momentBoot, momentDriver}

// TestMachineFaults causes every fault at every moment of a load test. The load test boots a real kernel of
// PREBAKE_MIRROR in a virtual machine and loads a module.
func TestMachineFaults(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	reference := newTheatre(t, s.farm(t))
	s.equip(reference)
	first := reference.run(t, "", "")
	if first.Digest == "" {
		t.Fatalf("without a fault: %+v", first)
	}
	reference.checkTestResult(t, first.Digest)

	adoptOrphans(t)
	var mu sync.Mutex
	seen := map[string]string{}
	t.Run("strike", func(t *testing.T) {
		for moment, text := range map[string]string{momentStart: "", momentBoot: bootText, momentDriver: driverText} {
			for _, kind := range faults {
				t.Run(moment+" "+kind, func(t *testing.T) {
					t.Parallel()
					th := newTheatre(t, s.farm(t))
					s.equip(th)
					// The cache has all inputs already. So on a full disk, the first write to fail is one of the load test itself.
					th.Warm, th.Text = pipeline.LoadTestOff, text
					if text != "" {
						// The temporary files are on another disk. Otherwise the end of the virtual machine would free space on the full
						// disk, and the verdict could be stored.
						th.tmp = t.TempDir()
					}
					cell := th.buildUnderFault(t, kind, "load test", first.Digest)
					th.checkTestResult(t, first.Digest)
					if left, err := os.ReadDir(th.tmp); text != "" && (err != nil || len(left) > 0) {
						t.Errorf("left in %s: %v, %v", th.tmp, left, err)
					}
					mu.Lock()
					defer mu.Unlock()
					seen[moment+" "+kind] = cell
				})
			}
		}
	})
	if !t.Failed() {
		checkTable(t, "machine ", "moment", moments, seen)
	}
}

// TestMachineInputsDamaged damages an input of the load test in the cache. The build must not use the damaged input,
// and the next build must publish the right test result.
func TestMachineInputsDamaged(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	rows := []struct {
		name  string
		warm  pipeline.LoadTest
		parts []string
		class string // class of the first build's error; "" means success
	}{
		{"kept verdict", pipeline.LoadTestAuto, []string{"facts"}, ""},
		{"kernel and boot files", pipeline.LoadTestOff, []string{"trees/boot-v1"}, "transient"},
		{"modules", pipeline.LoadTestOff, []string{"trees/modules"}, "transient"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			th := newTheatre(t, s.farm(t))
			s.equip(th)
			th.Warm, th.Parts = row.warm, row.parts
			got := th.run(t, faultCache, "load test")
			t.Logf("%+v", got)
			if got.Class != row.class {
				t.Errorf("the struck build ended with %q: %s; want %q", got.Class, got.Error, row.class)
			}
			th.Warm = ""
			again := th.run(t, "", "")
			if again.Class != "" || got.Class == "" && again.Digest != got.Digest {
				t.Fatalf("after the restart: %+v", again)
			}
			th.checkTestResult(t, again.Digest)
		})
	}
}

// stage has the files of a real kernel, and a small module that this kernel loads in place of a driver.
type stage struct {
	headers, release map[string]string
	boot             []byte
	init, probe      string
}

func newStage(t *testing.T) *stage {
	t.Helper()
	mirror, err := url.Parse(os.Getenv("PREBAKE_MIRROR"))
	if err != nil || mirror.Scheme != "file" {
		t.Skip("PREBAKE_MIRROR is not set: want the file:// URL of a folder with cos/, as `mirror` makes it")
	}
	found, err := filepath.Glob(filepath.Join(mirror.Path, "cos", "*", "lakitu", "prebake-boot.tgz"))
	if err != nil || len(found) == 0 {
		t.Fatalf("boot archives in %s: %v, %v", mirror, found, err)
	}
	kernel := filepath.Dir(found[0])
	s := &stage{init: goProgram(t, "pkg/vm/guestinit", false), probe: goProgram(t, "fetcher/nvmlprobe", true)}

	// The boot archive here has only the kernel, so the virtual machine boots faster.
	boot := unpacked(t, filepath.Join(kernel, "prebake-boot.tgz"))
	var small bytes.Buffer
	tarOf(t, map[string]string{"vmlinuz": text(t, filepath.Join(boot, "vmlinuz"))}, gzip.NewWriter(&small))
	s.boot = small.Bytes()

	tree := unpacked(t, filepath.Join(kernel, "kernel-headers.tgz"))
	trees, err := filepath.Glob(filepath.Join(tree, "usr/src/linux-headers-*"))
	if err != nil || len(trees) != 1 {
		t.Fatalf("header trees: %v, %v", trees, err)
	}
	// standIn compiles with the whole header tree. The build needs only the files that its checks read.
	s.headers = map[string]string{}
	for _, name := range []string{"Makefile", ".config", "Module.symvers", "include/config/kernel.release"} {
		s.headers["usr/src/"+filepath.Base(trees[0])+"/"+name] = text(t, filepath.Join(trees[0], name))
	}
	s.release = driverFiles()
	s.release["kernel-open/nvidia.compiled"] = text(t, standIn(t, trees[0]))
	s.release["kernel-open/Makefile"] = "modules:\n\t@echo '  CC [M]  nv.o'\n\t@cp nvidia.compiled nvidia.ko\n"
	delete(s.release, "kernel-open/nv.c")
	s.release["libnvidia-ml.so."+version+"*"] = text(t, standInNVML(t))
	return s
}

// farm returns a farm whose buckets have the stage's kernel and driver.
func (s *stage) farm(t *testing.T) *farm {
	t.Helper()
	f := newFarm(t)
	f.kernel(t, "17800.0.9", s.headers)
	f.putChecked(t, "cos/17800.0.9/lakitu/prebake-boot.tgz", s.boot)
	f.driver(t, s.release)
	return f
}

func (s *stage) equip(th *theatre) { th.Init, th.Probe = s.init, s.probe }

// checkTestResult checks that exactly one test result is published, and that its content is right.
func (th *theatre) checkTestResult(t *testing.T, digest string) {
	t.Helper()
	repo, err := registry.Open(th.f.repo, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	bundles, err := repo.Attached(t.Context(), digest, trust.ArtifactTypeBundle)
	if err != nil {
		t.Fatal(err)
	}
	all := th.f.verifier(t).Statements(bundles, digest, trust.PredicateTestResult)
	if len(all) != 1 {
		t.Fatalf("%d test results published; want one", len(all))
	}
	r, err := trust.ParseTestResult(all[0])
	if err != nil || r.LoadTest.Verdict != trust.VerdictLoaded || r.LoadTest.NVMLVersion != version {
		t.Errorf("published test result %+v, %v; want loaded, %s", r.LoadTest, err, version)
	}
}

// standIn compiles a small module in place of a driver. The module shows its version in /proc, as NVIDIA's driver does.
func standIn(t *testing.T, headers string) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "Makefile"), "obj-m := nvidia.o\nnvidia-y := nv.o\n")
	write(t, filepath.Join(dir, "nv.c"), `#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
static struct proc_dir_entry *dir;
static int show(struct seq_file *m, void *v)
{
	seq_puts(m, "NVRM version: stand-in `+version+`\n");
	return 0;
}
static int __init start(void)
{
	pr_info("`+driverText+`\n");
	dir = proc_mkdir("driver/nvidia", NULL);
	return dir && proc_create_single("version", 0444, dir, show) ? 0 : -ENOMEM;
}
static void __exit stop(void) { proc_remove(dir); }
module_init(start);
module_exit(stop);
MODULE_LICENSE("Dual MIT/GPL");
MODULE_VERSION("`+version+`");
`)
	run(t, exec.Command("make", "-C", headers, "M="+dir, "modules"))
	run(t, exec.Command("strip", "-g", filepath.Join(dir, "nvidia.ko")))
	return filepath.Join(dir, "nvidia.ko")
}

// standInNVML compiles a library with those functions of NVML that the probe program calls.
func standInNVML(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "nvml.c"), `#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { strncpy(out, "`+version+`", size); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { *out = 12020; return 0; }
int nvmlDeviceGetCount_v2(unsigned *out) { *out = 0; return 0; }
`)
	lib := filepath.Join(dir, "nvml.so")
	run(t, exec.Command("gcc", "-shared", "-fPIC", "-s", "-Wl,-soname,libnvidia-ml.so.1", "-o", lib,
		filepath.Join(dir, "nvml.c")))
	return lib
}

func goProgram(t *testing.T, pkg string, cgo bool) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), filepath.Base(pkg))
	program.Compile(t, out, pkg, runtime.GOARCH, cgo)
	return out
}

func run(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
}

func unpacked(t *testing.T, file string) string {
	t.Helper()
	dir := t.TempDir()
	if _, err := archive.UnpackFile(t.Context(), file, dir, archive.Options{}); err != nil {
		t.Fatal(err)
	}
	return dir
}

func text(t *testing.T, file string) string {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// alarm is a writer that calls ring when text appears in its input for the first time.
type alarm struct {
	text, last []byte
	ring       func()
}

func (a *alarm) Write(p []byte) (int, error) {
	a.last = append(a.last, p...)
	if a.ring != nil && bytes.Contains(a.last, a.text) {
		ring := a.ring
		a.ring = nil
		ring()
	}
	a.last = a.last[max(0, len(a.last)-len(a.text)):]
	return len(p), nil
}

const machineWord = "MACHINE "

// tellMachines prints the process ids of this process's children, which are its virtual machines.
func tellMachines() error {
	all, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return err
	}
	for _, file := range all {
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // the process has ended
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		if f := strings.Fields(rest); len(f) > 1 && f[1] == strconv.Itoa(os.Getpid()) {
			fmt.Println(machineWord + filepath.Base(filepath.Dir(file)))
		}
	}
	return nil
}

// machinesIn reads the process ids that tellMachines printed.
func machinesIn(t *testing.T, out []byte) (pids []int) {
	t.Helper()
	for line := range strings.Lines(string(out)) {
		if number, ok := strings.CutPrefix(strings.TrimSpace(line), machineWord); ok {
			pid, err := strconv.Atoi(number)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// adoptOrphans makes this process the parent of virtual machines whose builder died, so that it can wait for their end.
func adoptOrphans(t *testing.T) {
	t.Helper()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
}

// checkKilled checks that a virtual machine was killed with SIGKILL when its builder died.
func checkKilled(t *testing.T, pid int) {
	t.Helper()
	var status unix.WaitStatus
	_, err := unix.Wait4(pid, &status, 0, nil)
	for errors.Is(err, unix.EINTR) {
		_, err = unix.Wait4(pid, &status, 0, nil)
	}
	if err != nil || status.Signal() != unix.SIGKILL {
		t.Errorf("machine %d ended with status %d, signal %v, %v; want it killed with its builder", pid, status.ExitStatus(),
			status.Signal(), err)
	}
}
