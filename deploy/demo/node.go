package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/vm"
	"github.com/prebake/prebake/pkg/vm/emugpu"
)

// diskBytes is the size of the node's disk. The image is sparse, and the driver takes less than a GiB of it.
const diskBytes = 3 << 30

// disk is the node's disk, with the install folder. Like a real node's disk, it is kept between runs.
type disk struct {
	path string
	file *os.File // locked while the disk is in use
}

// openDisk opens the disk that earlier runs left in the folder state, or makes an empty one. If another run uses that
// disk, it makes an empty disk in dir.
func openDisk(ctx context.Context, state, dir string) (_ *disk, err error) {
	if err := os.MkdirAll(state, 0o755); err != nil {
		return nil, err
	}
	d := &disk{path: filepath.Join(state, "node.img")}
	if d.file, err = os.OpenFile(d.path, os.O_RDWR|os.O_CREATE, 0o644); err != nil {
		return nil, err
	}
	err = syscall.Flock(int(d.file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		if err := d.file.Close(); err != nil {
			return nil, err
		}
		d.path = filepath.Join(dir, "node.img")
		d.file, err = os.OpenFile(d.path, os.O_RDWR|os.O_CREATE, 0o644)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the node's disk: %w", err), d.file.Close())
	}
	info, err := d.file.Stat()
	if err == nil && info.Size() != diskBytes {
		err = d.format(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, d.close(false))
	}
	return d, nil
}

func (d *disk) format(ctx context.Context) error {
	if err := errors.Join(d.file.Truncate(0), d.file.Truncate(diskBytes)); err != nil {
		return err
	}
	mke2fs, err := exec.LookPath("mke2fs")
	if err != nil {
		mke2fs = "/usr/sbin/mke2fs" // Debian's default PATH for users lacks this folder
	}
	if out, err := exec.CommandContext(ctx, mke2fs, "-q", "-F", "-t", "ext4", d.path).CombinedOutput(); err != nil {
		return fault.Wrap(fault.Usage, fmt.Errorf("make the node's file system: %w: %s", err, out),
			"install the missing programs: make setup")
	}
	return nil
}

// close releases the disk. After a failed run (keep is false), it empties the disk, and the next run makes a new file
// system.
func (d *disk) close(keep bool) error {
	var err error
	if !keep {
		err = d.file.Truncate(0)
	}
	return errors.Join(err, d.file.Close())
}

// nodeRun is one run of the fetcher on the node, and its report.
type nodeRun struct {
	report testbed.Report
	code   int      // exit status of the fetcher
	live   []string // NVIDIA's modules in the kernel
	boot   float64  // duration of the node's boot, in seconds
}

// boot boots the node without a GPU and asks the fetcher what it sees. After that, boot adds the emulated GPU, lets the
// fetcher install the driver, and switches the node off.
func (d *demo) boot(ctx context.Context, boot string, disk *disk) error {
	const gpu = "/lib/emugpu.ko"
	fmt.Fprintf(d.out, "booting %s in qemu, which emulates the processor too...\n", d.kernel.Release)
	res, err := d.scene.RunNode(ctx, testbed.Node{
		Kernel: d.kernel, Boot: boot, Key: d.key + ".pub", Disk: disk.path, Console: d.console,
		KernelArgs: []string{emugpu.KernelArg(target.AMD64)},
		Files:      []vm.File{{Name: gpu, Path: filepath.Join(boot, vm.BootGPU)}},
	}, []vm.Step{
		{Name: "mount the disk", Argv: []string{"@mount", "/dev/vda", testbed.InstallDir}},
		{Name: "status", KeepGoing: true, Timeout: 2 * time.Minute, Argv: []string{
			"/usr/bin/fetcher", "status", "--install-dir", testbed.InstallDir, "--output", "json",
		}},
		{Name: "put the GPU in", Argv: []string{"@insmod", gpu}},
		testbed.InstallStep(d.srv), testbed.ModulesStep(),
	})
	if err != nil {
		return err
	}
	for _, name := range []string{"mount the disk", "put the GPU in"} {
		if step, _ := res.Step(name); step.ExitCode != 0 {
			return fmt.Errorf("run the step %q on the node: %s", name, step.Error)
		}
	}
	fmt.Fprintln(d.out, "before the emulated GPU is put in, the fetcher sees:")
	if d.bare, err = d.readRun(res, "status"); err != nil {
		return err
	}
	fmt.Fprintln(d.out, "with it, after the installation:")
	if d.gpu, err = d.readRun(res, "install"); err != nil {
		return err
	}
	d.gpu.boot = res.BootSeconds
	return nil
}

// readRun reads and prints the fetcher's output in one step of the node. After the step "install", it also reads which
// modules are in the kernel.
func (d *demo) readRun(res *vm.Result, name string) (*nodeRun, error) {
	step, err := testbed.StepNamed(res, name)
	if err != nil {
		return nil, err
	}
	run := &nodeRun{code: step.ExitCode}
	if err := testbed.Decode(step, &run.report); err != nil {
		return nil, err
	}
	if name == "install" {
		modules, err := testbed.StepNamed(res, "modules")
		if err != nil {
			return nil, err
		}
		run.live = testbed.Live(modules.Stdout)
	}
	run.report.Print(d.out, run.code, run.live)
	return run, nil
}

func (r *nodeRun) phases() []timeline.Phase {
	return append([]timeline.Phase{{Name: "boot", Seconds: r.boot}}, r.report.Phases...)
}

// wantGPU checks the report of the node with the emulated GPU. The modules must be in the kernel, and NVML must report
// the built version. The verdict must be "unusable", because the driver cannot start the emulated GPU.
func (r *nodeRun) wantGPU(version, digest string) error {
	var problems []error
	for _, m := range []string{"nvidia", "nvidia-uvm", "nvidia-modeset"} {
		if !slices.Contains(r.live, m) {
			problems = append(problems, fmt.Errorf("the module %s is not in the node's kernel", m))
		}
	}
	v := r.report.Verdict
	if v.NVML.Version != version {
		problems = append(problems,
			fmt.Errorf("NVML answers with version %q (%s); want %s", v.NVML.Version, v.NVML.Error, version))
	}
	if v.Digest != digest {
		problems = append(problems, fmt.Errorf("the node has installed artifact %q; want %s, which was built", v.Digest,
			digest))
	}
	return errors.Join(append(problems, r.wantExit(fault.Unusable))...)
}

// wantNoDevice checks the report of the node before it has a GPU. The fetcher must report that there is no GPU or, on a
// new disk, that there is no driver.
func (r *nodeRun) wantNoDevice() error {
	if n := r.report.Verdict.PCIGPUs; n != 0 {
		return fmt.Errorf("before the emulated GPU is put in, the fetcher sees %d GPUs; want none", n)
	}
	if r.code == fault.NoArtifact.ExitCode() && r.report.Verdict.State == "absent" {
		return nil
	}
	return r.wantExit(fault.NoDevice)
}

func (r *nodeRun) wantExit(kind fault.Kind) error {
	if r.code != kind.ExitCode() {
		return fmt.Errorf("the fetcher ended with exit status %d (%s); want exit status %d (%s)",
			r.code, r.report.Verdict.State, kind.ExitCode(), kind.What())
	}
	return nil
}

// reuseNote matches the note of a phase in which the builder used stored results.
var reuseNote = regexp.MustCompile(`^([0-9]+) [a-z]+, ([0-9]+) (?:remembered|reused)$`)

// wantRemembered checks the build for the sibling kernel. At least nine tenths of conftest's results and of the object
// files must come from the first build's caches. If an earlier demo has left the finished modules in the cache, there
// is nothing to check.
func wantRemembered(phases []timeline.Phase) error {
	if slices.ContainsFunc(phases, func(p timeline.Phase) bool {
		return p.Name == "compile" && strings.HasSuffix(p.Note, "cached")
	}) {
		return nil
	}
	var problems []error
	for _, name := range []string{"conftest", "compile"} {
		// The phases "conftest" and "compile" are parts of a phase that is also called "compile".
		i := slices.IndexFunc(phases, func(p timeline.Phase) bool { return p.Name == name && p.Of != "" })
		if i < 0 {
			problems = append(problems, fmt.Errorf("the build for the sibling kernel has no phase %s", name))
			continue
		}
		var kept, all int
		if m := reuseNote.FindStringSubmatch(phases[i].Note); m != nil {
			all, _ = strconv.Atoi(m[1]) // the pattern allows only digits
			kept, _ = strconv.Atoi(m[2])
		}
		if kept*10 < all*9 || kept == 0 {
			problems = append(problems,
				fmt.Errorf("phase %s of the build for the sibling kernel says %q; want nine tenths remembered or reused", name,
					phases[i].Note))
		}
	}
	return errors.Join(problems...)
}
