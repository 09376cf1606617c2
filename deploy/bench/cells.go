package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

type mirror struct {
	Dir     string
	Builds  []build
	Drivers []driver `json:"drivers"`
}

type driver struct {
	Version string `json:"version"`
}

type build struct {
	target.Kernel
	// Package is the version of the kernel's Debian packages, such as 6.1.192-2.
	Package string `json:"debianPackageVersion"`
	Note    string `json:"note"`
}

// upstream returns the kernel's version without Debian's own revision. Kernels with the same upstream version are
// siblings.
func (k build) upstream() string {
	version, _, _ := strings.Cut(k.Package, "-")
	return version
}

// cell is one kernel with one driver, and the role of this pair in the matrix.
type cell struct {
	kernel build
	driver string
	// role is what the builder has already built before this cell:
	//   - "cold": nothing
	//   - "sibling": the driver, for a sibling kernel
	//   - "neighbour": another driver, for this kernel; the cell has the second driver
	//   - "next": another driver, for this kernel; the cell has the third driver
	//   - "": anything else
	role string
}

func (c cell) String() string { return c.kernel.Release + " " + c.driver }

type bench struct {
	*testbed.Scene
	options
	mirror *mirror
	key    string

	headers, sources map[string]string // unpacked folders, by release and by driver
	toolchain        string
	dkms             string // path of the script dkms

	roles        map[string]*ratio // by name of the role
	cells        []cell            // cells of the last run whose driver compiles
	whole, small []float64
	matrix       ratio
	compile      ratio
	warm, node   ratio
	fetching     fetching
	loaded       ratio
	loadedPhases []timeline.Phase // phases of the last run
}

// measureOnce builds the cells of the matrix in order, beginning with an empty cache. It leaves out cells that no
// wanted measurement needs. It also measures the alternatives, plain `make` and dkms.
func (b *bench) measureOnce(ctx context.Context, n int) error {
	cache := filepath.Join(b.Dir, fmt.Sprintf("cache-%d", n))
	repo := "oci:" + filepath.Join(b.Dir, fmt.Sprintf("layout-%d", n))
	var ours, theirs, plain float64
	b.cells = nil
	byDKMS := map[string]float64{} // seconds of dkms for the last cell of each driver
	done := map[string]bool{}      // kernels, and upstream versions with a driver, that were built
	for _, k := range b.mirror.Builds {
		for i, d := range b.mirror.Drivers {
			c := cell{kernel: k, driver: d.Version}
			switch {
			case done[k.upstream()+" "+d.Version]:
				c.role = "sibling"
			case done[k.Release] && i == 1:
				c.role = "neighbour"
			case done[k.Release]:
				c.role = "next"
			case len(done) == 0:
				c.role = "cold"
			}
			if !b.inRun(c, n) {
				continue
			}
			seconds, phases, err := b.build(ctx, c, cache, repo)
			if fault.Is(err, fault.APIBreak) {
				fmt.Fprintf(b.Out, "%s does not compile\n", c)
				continue
			}
			if err != nil {
				return err
			}
			done[k.upstream()+" "+d.Version], done[k.Release] = true, true
			b.cells = append(b.cells, c)
			ours += seconds
			fmt.Fprintf(b.Out, "%s: %.1f s %s\n", c, seconds, c.role)
			if r := b.roles[c.role]; r != nil && b.only[c.role] && len(r.ours) == n {
				if plain == 0 || !b.plainOnce {
					if plain, err = b.measurePlain(ctx, c); err != nil {
						return err
					}
				}
				r.ours, r.theirs = append(r.ours, seconds), append(r.theirs, plain)
				fmt.Fprintf(b.Out, "%s, %s: %.1f s, plain make %.1f s\n", c, c.role, seconds, plain)
				if c.role == "cold" {
					for _, p := range phases {
						if p.Name == "compile" && p.Of == "" {
							b.compile.ours, b.compile.theirs = append(b.compile.ours, p.Seconds), append(b.compile.theirs, plain)
						}
					}
				}
			}
			if b.only["matrix"] {
				if byDKMS[c.driver] == 0 || !b.plainOnce {
					if byDKMS[c.driver], err = b.dkmsSeconds(ctx, c); err != nil {
						return err
					}
					fmt.Fprintf(b.Out, "%s: dkms %.1f s\n", c, byDKMS[c.driver])
				}
				theirs += byDKMS[c.driver]
			}
		}
	}
	if b.only["matrix"] {
		b.matrix.ours, b.matrix.theirs = append(b.matrix.ours, ours), append(b.matrix.theirs, theirs)
	}
	if !b.only["node"] || len(b.cells) == 0 {
		return nil
	}
	return b.installOnNode(ctx, n, cache, repo)
}

// inRun reports whether a run builds a cell. A run builds the cells that it measures, and the cells whose results these
// reuse.
func (b *bench) inRun(c cell, run int) bool {
	hasSibling := slices.ContainsFunc(b.mirror.Builds, func(k build) bool {
		return k.upstream() == c.kernel.upstream() && k.Release != c.kernel.Release
	})
	switch {
	case b.only["matrix"]:
		return true
	case b.roles[c.role] != nil && len(b.roles[c.role].ours) > run:
		return false // one cell of each role is enough for a run
	case c.role == "cold":
		return b.only["cold"] || b.only["neighbour"] || b.only["next"] || b.only["node"] || hasSibling
	case c.role == "neighbour", c.role == "next":
		return b.only[c.role]
	}
	return b.only["sibling"] && hasSibling
}

// result has the fields of the output of "builder build --output json" that this program reads.
type result struct {
	Layers []bundle.Layer   `json:"layers"`
	Phases []timeline.Phase `json:"phases"`
}

func (b *bench) build(ctx context.Context, c cell, cache, to string) (float64, []timeline.Phase, error) {
	start := time.Now()
	res, err := b.Run(ctx, "builder", "build", "--build-id", c.kernel.BuildID, "--board", c.kernel.Board, "--driver",
		c.driver,
		"--kernel-mirror", "file://"+filepath.Join(b.mirror.Dir, "cos"), "--driver-mirror",
		"file://"+filepath.Join(b.mirror.Dir, "drivers"),
		"--cache", cache, "--key", b.key, "--to", to, "--load-test", "off", "--output", "json")
	if err != nil {
		return 0, nil, err
	}
	if res.Code == fault.APIBreak.ExitCode() {
		return 0, nil, fault.New(fault.APIBreak, c.String(), "")
	}
	if res.Code != 0 {
		return 0, nil, fmt.Errorf("build the cell %s: the command builder ended with exit status %d", c, res.Code)
	}
	seconds := time.Since(start).Seconds()
	var r result
	if err := json.Unmarshal(res.Stdout, &r); err != nil {
		return 0, nil, fmt.Errorf("read the result of the command builder: %w", err)
	}
	for _, p := range r.Phases {
		fmt.Fprintf(b.Out, "  %-10s %6.1f s  %s\n", p.Name, p.Seconds, p.Note)
	}
	var small, whole float64
	for _, l := range r.Layers {
		whole += float64(l.Size) / 1e6
		if l.Kind == bundle.LayerModules {
			small = float64(l.Size) / 1e6
		}
	}
	b.small, b.whole = append(b.small, small), append(b.whole, whole)
	return seconds, r.Phases, nil
}

// headerTree unpacks the headers of a kernel as a person would do by hand, and returns their folder. It unpacks each
// kernel's headers once, and the toolchain once.
func (b *bench) headerTree(ctx context.Context, k build) (string, error) {
	if dir := b.headers[k.Release]; dir != "" {
		return dir, nil
	}
	from := filepath.Join(b.mirror.Dir, "cos", k.BuildID, k.Board)
	unpack := func(name, dir string) error {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if _, err := archive.UnpackFile(ctx, filepath.Join(from, name), dir, archive.Options{XZTool: "xz"}); err != nil {
			return fmt.Errorf("unpack %s: %w", name, err)
		}
		return nil
	}
	if b.toolchain == "" { // Debian compiled all these kernels with the same toolchain
		b.toolchain = filepath.Join(b.Dir, "toolchain")
		if err := unpack("toolchain.tar.xz", b.toolchain); err != nil {
			return "", err
		}
	}
	dir := filepath.Join(b.Dir, "headers-"+k.Release)
	if err := unpack("kernel-headers.tgz", dir); err != nil {
		return "", err
	}
	b.headers[k.Release] = filepath.Join(dir, "usr", "src", "linux-headers-"+k.Release)
	return b.headers[k.Release], nil
}

// source unpacks a driver's runfile as a person would do by hand. It unpacks each runfile only once, and returns the
// folder with the sources of the proprietary modules.
func (b *bench) source(ctx context.Context, driver string) (string, error) {
	if dir := b.sources[driver]; dir != "" {
		return dir, nil
	}
	dir := filepath.Join(b.Dir, "runfile-"+driver)
	runfile := filepath.Join(b.mirror.Dir, "drivers", "NVIDIA-Linux-x86_64-"+driver+".run")
	if err := b.command(ctx, "sh", runfile, "--noexec", "--target", dir); err != nil {
		return "", err
	}
	b.sources[driver] = filepath.Join(dir, "kernel")
	return b.sources[driver], nil
}

func (b *bench) command(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(b.toolchain, "bin")+":"+os.Getenv("PATH"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("run %s %s: %w: %s", name, strings.Join(args, " "), err, out[max(0, len(out)-500):])
	}
	return nil
}

// makeFlags returns the arguments that pass the header folders and the compiler's name to make.
func makeFlags(headers string) []string {
	return []string{"SYSSRC=" + headers, "SYSOUT=" + headers, "CC=x86_64-cros-linux-gnu-gcc",
		"LD=x86_64-cros-linux-gnu-ld", "IGNORE_CC_MISMATCH=1"}
}

// clangFlags returns additional arguments of `make` for a kernel that clang compiled. Without KCFLAGS, clang's warnings
// would stop NVIDIA's conftest.sh.
func clangFlags() []string {
	return []string{"LLVM=1", "ARCH=x86_64", "CC=x86_64-cros-linux-gnu-clang", "LD=x86_64-cros-linux-gnu-ld.lld",
		"HOSTCC=x86_64-pc-linux-gnu-clang", "HOSTCXX=x86_64-pc-linux-gnu-clang++",
		"KCFLAGS=-Wno-error -Wno-error=strict-prototypes"}
}

// measurePlain measures what people do by hand: `make modules` in unpacked sources.
func (b *bench) measurePlain(ctx context.Context, c cell) (float64, error) {
	headers, err := b.headerTree(ctx, c.kernel)
	if err != nil {
		return 0, err
	}
	source, err := b.source(ctx, c.driver)
	if err != nil {
		return 0, err
	}
	tree := filepath.Join(b.Dir, "plain")
	if err := os.CopyFS(tree, os.DirFS(source)); err != nil {
		return 0, err
	}
	start := time.Now()
	args := append([]string{"-C", tree, "modules", "KERNEL_UNAME=" + c.kernel.Release,
		fmt.Sprintf("-j%d", runtime.NumCPU())}, makeFlags(headers)...)
	if b.clang {
		args = append(args, clangFlags()...)
	}
	if err := b.command(ctx, "make", args...); err != nil {
		return 0, err
	}
	return time.Since(start).Seconds(), os.RemoveAll(tree)
}

// installOnNode builds the first cell again, and installs the driver into a folder that looks like the root of a COS
// node. It measures the build and the installation, and loads no modules.
func (b *bench) installOnNode(ctx context.Context, n int, cache, repo string) error {
	c := b.cells[0]
	plain, err := b.measurePlain(ctx, c)
	if err != nil {
		return err
	}
	seconds, _, err := b.build(ctx, c, cache, "oci:"+filepath.Join(b.Dir, fmt.Sprintf("layout-%d-again", n)))
	if err != nil {
		return err
	}
	b.warm.ours, b.warm.theirs = append(b.warm.ours, seconds), append(b.warm.theirs, plain)
	root := filepath.Join(b.Dir, fmt.Sprintf("node-%d", n))
	if err := testbed.NodeRoot(root, c.kernel.Kernel); err != nil {
		return err
	}
	start := time.Now()
	if _, err := b.Must(ctx, "fetcher", "install", "--registry", repo, "--host-root", root, "--key", b.key+".pub",
		"--driver", c.driver,
		"--flavour", string(target.Proprietary), "--no-load", "--builder", "never", "--output", "json"); err != nil {
		return err
	}
	b.node.ours, b.node.theirs = append(b.node.ours, time.Since(start).Seconds()), append(b.node.theirs, plain)
	return nil
}

func (b *bench) print(out io.Writer) {
	jobs := runtime.NumCPU()
	fmt.Fprintf(out, "%s, %d processors, %d run(s), medians; proprietary flavour\n",
		time.Now().UTC().Format(time.DateOnly), jobs, b.runs)
	for _, c := range b.cells {
		fmt.Fprintf(out, "  %s (Debian %s) %s\n", c, c.kernel.Package, c.role)
	}
	llvm := ""
	if b.clang {
		llvm = "LLVM=1 "
	}
	which, each := "of the same cell", "for each cell"
	if b.plainOnce {
		which, each = "of the run's first cell", "for each driver on its first kernel, times the kernels"
	}
	plain := fmt.Sprintf("make modules SYSSRC=HEADERS SYSOUT=HEADERS KERNEL_UNAME=RELEASE %sCC=.. LD=.. "+
		"IGNORE_CC_MISMATCH=1 -j%d, %s, sources unpacked", llvm, jobs, which)
	rows := []ratio{
		{"cold: from empty caches, source to published", plain, b.roles["cold"].ours, b.roles["cold"].theirs, "s"},
		{"  of it, the compile phase in the sandbox", plain, b.compile.ours, b.compile.theirs, "s"},
		{"sibling kernel, same driver, source to published", plain, b.roles["sibling"].ours, b.roles["sibling"].theirs, "s"},
		{"same kernel, a neighbour of the driver before, source to published", plain, b.roles["neighbour"].ours,
			b.roles["neighbour"].theirs, "s"},
		{"same kernel, next driver of the branch, source to published", plain, b.roles["next"].ours, b.roles["next"].theirs,
			"s"},
		{fmt.Sprintf("matrix of %d cells, from empty caches", len(b.cells)),
			fmt.Sprintf("dkms build -m nvidia -v VERSION -k RELEASE --kernelsourcedir HEADERS -j %d, %s", jobs, each),
			b.matrix.ours, b.matrix.theirs, "s"},
		{"the same build once more, caches warm", plain, b.warm.ours, b.warm.theirs, "s"},
		{"node: resolve, fetch, verify, stage, switch", "compile on the node: " + plain, b.node.ours, b.node.theirs, "s"},
	}
	if b.only["node"] {
		rows = append(rows, ratio{"bytes a node fetches when only the kernel changed",
			"the whole artifact, as one-blob drivers need", b.small, b.whole, "MB"})
	}
	for _, r := range rows {
		r.print(out)
	}
	b.printFetch(out)
	b.printGuest(out)
}
