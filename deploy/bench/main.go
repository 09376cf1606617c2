// Command bench measures Prebake's headline numbers, each as a ratio against a
// named alternative in the same run: these are what holds on another machine.
// It refuses to judge them; no test depends on a time.
package main

import (
	"context"
	"encoding/json"
	"errors"
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

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/deploy/internal/scene"
	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

func main() {
	cli.Main(&ucli.Command{
		Name:  "bench",
		Usage: "print the headline ratios",
		Flags: []ucli.Flag{
			&ucli.StringFlag{Name: "bin", Value: "bin", Usage: "`FOLDER` with the product's programs"},
			&ucli.IntFlag{Name: "runs", Value: 1, Usage: "runs of each measurement; the median counts"},
		},
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			return run(ctx, cmd.String("bin"), max(1, cmd.Int("runs")), cmd.Root().Writer)
		},
	})
}

// ratio is one line of the result.
type ratio struct {
	what, alternative string
	ours, theirs      []float64
	unit              string
}

func (r ratio) print(w io.Writer) {
	ours, theirs := median(r.ours), median(r.theirs)
	fmt.Fprintf(w, "%6.3f  %s\n        %.1f %s; against %.1f %s: %s\n", ours/theirs, r.what, ours, r.unit, theirs, r.unit, r.alternative)
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}

func run(ctx context.Context, bin string, runs int, out io.Writer) (err error) {
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "prebake-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s, err := scene.New(bin, dir, os.Stderr)
	if err != nil {
		return err
	}
	m, err := s.Mirror(ctx)
	if err != nil {
		return err
	}
	b := &bench{Scene: s, mirror: m, kernel: m.Builds[1].Kernel, driver: m.Drivers[0].Version, key: filepath.Join(dir, "key")}
	if _, err := s.Must(ctx, "builder", "keygen", b.key); err != nil {
		return err
	}
	if err := b.layOut(ctx); err != nil {
		return err
	}
	for i := range runs {
		if err := b.once(ctx, i); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "driver %s (proprietary), kernel %s, make -j%d, %d run(s), medians\n", b.driver, b.kernel.Release, runtime.NumCPU(), runs)
	for _, r := range []ratio{
		{"build from empty caches, source to published", "plain make modules of the same cell, sources unpacked", b.cold, b.plain, "s"},
		{"  of it, the compile phase in the sandbox", "plain make modules of the same cell", b.compile, b.plain, "s"},
		{"the same build once more, caches warm", "plain make modules of the same cell", b.warm, b.plain, "s"},
		{"node: resolve, fetch, verify, stage, switch", "compile on the node (plain make modules)", b.install, b.plain, "s"},
		{"bytes a node fetches when only the kernel changed", "the whole artifact, as one-blob drivers need", b.small, b.whole, "MB"},
	} {
		r.print(out)
	}
	return nil
}

type bench struct {
	*scene.Scene
	mirror *scene.Mirror
	kernel target.Kernel
	driver string
	key    string

	headers, toolchain, source string

	plain, cold, compile, warm, install, small, whole []float64
}

// layOut unpacks what a person would unpack by hand for a plain make.
func (b *bench) layOut(ctx context.Context) error {
	from := filepath.Join(b.mirror.Dir, "cos", b.kernel.BuildID, b.kernel.Board)
	for name, dir := range map[string]string{"kernel-headers.tgz": "headers", "toolchain.tar.xz": "toolchain"} {
		dir = filepath.Join(b.Dir, dir)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if _, err := archive.UnpackFile(ctx, filepath.Join(from, name), dir, archive.Options{XZTool: "xz"}); err != nil {
			return fmt.Errorf("unpack %s: %w", name, err)
		}
	}
	b.headers = filepath.Join(b.Dir, "headers", "usr", "src", "linux-headers-"+b.kernel.Release)
	b.toolchain = filepath.Join(b.Dir, "toolchain")
	b.source = filepath.Join(b.Dir, "runfile")
	runfile := filepath.Join(b.mirror.Dir, "drivers", "NVIDIA-Linux-x86_64-"+b.driver+".run")
	return b.command(ctx, "sh", runfile, "--noexec", "--target", b.source)
}

func (b *bench) command(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(b.toolchain, "bin")+":"+os.Getenv("PATH"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out[max(0, len(out)-500):])
	}
	return nil
}

func (b *bench) once(ctx context.Context, n int) error {
	// The alternative first: what people do today.
	fmt.Fprintf(b.Out, "plain make...\n")
	tree := filepath.Join(b.Dir, fmt.Sprintf("plain-%d", n))
	if err := os.CopyFS(tree, os.DirFS(filepath.Join(b.source, "kernel"))); err != nil {
		return err
	}
	start := time.Now()
	if err := b.command(ctx, "make", "-C", tree, "modules", "SYSSRC="+b.headers, "SYSOUT="+b.headers, "KERNEL_UNAME="+b.kernel.Release,
		"CC=x86_64-cros-linux-gnu-gcc", "LD=x86_64-cros-linux-gnu-ld", "IGNORE_CC_MISMATCH=1", fmt.Sprintf("-j%d", runtime.NumCPU())); err != nil {
		return err
	}
	b.plain = append(b.plain, time.Since(start).Seconds())
	if err := os.RemoveAll(tree); err != nil {
		return err
	}

	cache := filepath.Join(b.Dir, fmt.Sprintf("cache-%d", n))
	repo := "oci:" + filepath.Join(b.Dir, fmt.Sprintf("layout-%d", n))
	seconds, phases, err := b.build(ctx, cache, repo)
	if err != nil {
		return err
	}
	b.cold = append(b.cold, seconds)
	for _, p := range phases {
		if p.Name == "compile" && p.Of == "" {
			b.compile = append(b.compile, p.Seconds)
		}
	}
	if seconds, _, err = b.build(ctx, cache, "oci:"+filepath.Join(b.Dir, fmt.Sprintf("layout-%d-again", n))); err != nil {
		return err
	}
	b.warm = append(b.warm, seconds)
	return b.node(ctx, n, repo)
}

// result is what builder build --output json prints, as far as it is read here.
type result struct {
	Layers []bundle.Layer   `json:"layers"`
	Phases []timeline.Phase `json:"phases"`
}

func (b *bench) build(ctx context.Context, cache, to string) (float64, []timeline.Phase, error) {
	start := time.Now()
	out, err := b.Must(ctx, "builder", "build", "--build-id", b.kernel.BuildID, "--board", b.kernel.Board, "--driver", b.driver,
		"--kernel-mirror", b.mirror.KernelURL(), "--driver-mirror", b.mirror.DriverURL(), "--cache", cache, "--key", b.key,
		"--to", to, "--load-test", "off", "--output", "json")
	if err != nil {
		return 0, nil, err
	}
	seconds := time.Since(start).Seconds()
	var res result
	if err := json.Unmarshal(out, &res); err != nil {
		return 0, nil, fmt.Errorf("read builder's result: %w", err)
	}
	var small, whole float64
	for _, l := range res.Layers {
		whole += float64(l.Size) / 1e6
		if l.Kind == bundle.LayerModules {
			small = float64(l.Size) / 1e6
		}
	}
	b.small, b.whole = append(b.small, small), append(b.whole, whole)
	return seconds, res.Phases, nil
}

// node installs from the layout folder on a root that looks like a COS node.
// Loading is left out: it costs the same whoever made the modules.
func (b *bench) node(ctx context.Context, n int, repo string) error {
	root := filepath.Join(b.Dir, fmt.Sprintf("node-%d", n))
	if err := scene.NodeRoot(root, b.kernel); err != nil {
		return err
	}
	start := time.Now()
	if _, err := b.Must(ctx, "fetcher", "install", "--registry", repo, "--host-root", root, "--key", b.key+".pub", "--driver", b.driver,
		"--flavour", string(target.Proprietary), "--no-load", "--builder", "never", "--output", "json"); err != nil {
		return err
	}
	b.install = append(b.install, time.Since(start).Seconds())
	return nil
}
