// Command demo runs Prebake's main job on one machine: it lays a COS-shaped
// mirror out of Debian's packages, starts a server and a builder, has a real
// NVIDIA driver built for a real kernel, and boots a virtual COS node that
// finds, verifies, installs and loads it. It refuses to fake any step.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/deploy/internal/scene"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/vm"
)

func main() {
	cli.Main(&ucli.Command{
		Name:  "demo",
		Usage: "build, publish, fetch and load a real driver on one machine",
		Flags: []ucli.Flag{
			&ucli.StringFlag{Name: "bin", Value: "bin", Usage: "`FOLDER` with the product's programs"},
			&ucli.StringFlag{Name: "flavour", Value: string(target.Proprietary), Usage: "proprietary or open"},
			&ucli.BoolFlag{Name: "console", Usage: "show the virtual node's console"},
		},
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			d := &demo{out: cmd.Root().Writer, flavour: target.Flavour(cmd.String("flavour"))}
			if cmd.Bool("console") {
				d.console = cmd.Root().ErrWriter
			}
			return d.run(ctx, cmd.String("bin"))
		},
	})
}

type demo struct {
	out     io.Writer
	console io.Writer
	flavour target.Flavour
	scene   *scene.Scene
	key     string
}

func (d *demo) title(format string, args ...any) {
	fmt.Fprintf(d.out, "\n== %s\n", fmt.Sprintf(format, args...))
}

func (d *demo) run(ctx context.Context, bin string) (err error) {
	start := time.Now()
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "prebake-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if d.scene, err = scene.New(bin, dir, os.Stderr); err != nil {
		return err
	}

	d.title("mirror: COS-shaped buckets out of Debian's packages")
	m, err := d.scene.Mirror(ctx)
	if err != nil {
		return err
	}
	version := m.Drivers[0].Version
	// The open flavour of this driver does not know the newest kernels.
	kernel, sibling, hasSibling := m.Siblings()
	if !hasSibling || d.flavour == target.Open {
		kernel, hasSibling = m.Builds[1].Kernel, false
	}
	fmt.Fprintf(d.out, "%d COS builds, %d drivers in %s\n", len(m.Builds), len(m.Drivers), m.Dir)

	d.title("server and builder")
	d.key = filepath.Join(dir, "prebake.key")
	if _, err := d.scene.Must(ctx, "builder", "keygen", d.key); err != nil {
		return err
	}
	srv, err := d.scene.StartServer(ctx, filepath.Join(dir, "server"), m)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, srv.Stop()) }()
	worker, err := d.scene.StartWorker(srv, m, d.key, d.scene.BuildCache())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, worker.Stop()) }()
	fmt.Fprintf(d.out, "matrix, API and registry on http://%s\n", srv.Addr)

	d.title("build: driver %s (%s) for COS build %s", version, d.flavour, kernel)
	build, err := d.build(ctx, srv, kernel, version)
	if err != nil {
		return err
	}

	var second api.Build
	if hasSibling {
		d.title("the same driver for COS build %s, a sibling of that kernel", sibling)
		if second, err = d.build(ctx, srv, sibling, version); err != nil {
			return err
		}
		if err := wantRemembered(second.Phases); err != nil {
			return err
		}
	}

	d.title("node with a GPU (emulated): boot, find, verify, install, load")
	boot, err := d.scene.Boot(ctx, m, kernel)
	if err != nil {
		return err
	}
	ref := srv.Repository() + "@" + build.Digest
	withGPU, err := d.node(ctx, srv, scene.Node{Kernel: kernel, Boot: boot, GPU: true, Key: d.key + ".pub", Console: d.console}, "boot with GPU")
	if err != nil {
		return err
	}
	if err := withGPU.wantGPU(version, build.Digest); err != nil {
		return err
	}
	d.title("the same node without a GPU")
	without, err := d.node(ctx, srv, scene.Node{Kernel: kernel, Boot: boot, Key: d.key + ".pub", Console: d.console}, "boot without GPU")
	if err != nil {
		return err
	}
	if want := fault.NoDevice.ExitCode(); without.code != want {
		return fmt.Errorf("node without a GPU: exit code %d; want %d", without.code, want)
	}

	d.title("result")
	if err := timeline.Print(d.out, "builder", build.Phases); err != nil {
		return err
	}
	if hasSibling {
		if err := timeline.Print(d.out, "builder, the sibling", second.Phases); err != nil {
			return err
		}
	}
	if err := timeline.Print(d.out, "node", withGPU.phases()); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "artifact  %s\n          @%s\nnode      %s; without a GPU: %s\ndone in   %.0f s\n",
		strings.TrimSuffix(ref, "@"+build.Digest), build.Digest, withGPU.report.Verdict.State, without.report.Verdict.State, time.Since(start).Seconds())
	return nil
}

// build asks the server for the cell and follows it to its end.
func (d *demo) build(ctx context.Context, srv *scene.Server, k target.Kernel, version string) (api.Build, error) {
	b, err := srv.Client.RequestBuild(ctx, api.BuildRequest{BuildID: k.BuildID, Board: k.Board, Driver: version, Flavour: string(d.flavour)})
	if err != nil {
		return b, err
	}
	began := time.Now()
	b, err = scene.WaitBuild(ctx, srv.Client, b.ID, func(b api.Build) {
		fmt.Fprintf(d.out, "%7.1f s  %s %s\n", time.Since(began).Seconds(), b.State, b.Phase)
	})
	if err != nil {
		return b, err
	}
	if b.State != api.Published {
		return b, fmt.Errorf("build %d is %s (%s): %s", b.ID, b.State, b.Class, b.Error)
	}
	for _, p := range b.Phases {
		if strings.Contains(p.Note, "cached") {
			fmt.Fprintf(d.out, "reused from an earlier run: %s (%s)\n", strings.TrimSpace(p.Name), p.Note)
		}
	}
	return b, nil
}

// remembered is how the builder says in a phase's note that it used what it kept.
var remembered = regexp.MustCompile(`^([0-9]+) [a-z]+, ([0-9]+) (?:remembered|reused)$`)

// wantRemembered holds the phases of a sibling's build against what a farm is for:
// most answers of conftest and most objects are those of the kernel before. A demo
// that ran before with these caches left even the modules themselves.
func wantRemembered(phases []timeline.Phase) error {
	if slices.ContainsFunc(phases, func(p timeline.Phase) bool { return p.Name == "compile" && strings.HasSuffix(p.Note, "cached") }) {
		return nil
	}
	var problems []error
	for _, name := range []string{"conftest", "compile"} {
		// Both are parts of a phase, and that one is called compile too.
		i := slices.IndexFunc(phases, func(p timeline.Phase) bool { return p.Name == name && p.Of != "" })
		if i < 0 {
			problems = append(problems, fmt.Errorf("the sibling's build has no phase %s", name))
			continue
		}
		var kept, all int
		if m := remembered.FindStringSubmatch(phases[i].Note); m != nil {
			all, _ = strconv.Atoi(m[1]) // digits, by the pattern
			kept, _ = strconv.Atoi(m[2])
		}
		if kept*10 < all*9 || kept == 0 {
			problems = append(problems, fmt.Errorf("the sibling's %s: %q; want nine tenths remembered or reused", name, phases[i].Note))
		}
	}
	return errors.Join(problems...)
}

type nodeRun struct {
	report scene.Report
	code   int
	live   []string
	boot   float64
}

func (d *demo) node(ctx context.Context, srv *scene.Server, n scene.Node, name string) (*nodeRun, error) {
	fmt.Fprintf(d.out, "booting %s in qemu (plain emulation, no KVM)...\n", n.Kernel.Release)
	res, err := d.scene.RunNode(ctx, n, []vm.Step{scene.InstallStep(srv), scene.ModulesStep()})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	install, err := scene.StepNamed(res, "install")
	if err != nil {
		return nil, err
	}
	run := &nodeRun{code: install.ExitCode, boot: res.BootSeconds}
	if err := scene.Decode(install, &run.report); err != nil {
		return nil, err
	}
	modules, err := scene.StepNamed(res, "modules")
	if err != nil {
		return nil, err
	}
	run.live = scene.Live(modules.Stdout)
	run.report.Print(d.out, run.code, run.live)
	return run, nil
}

func (r *nodeRun) phases() []timeline.Phase {
	return append([]timeline.Phase{{Name: "boot", Seconds: r.boot}}, r.report.Phases...)
}

// wantGPU holds the node's report against what has to be true: the modules
// are live and NVML answers the version that was built. The emulated GPU
// cannot be initialised, so the honest verdict is "present but not usable".
func (r *nodeRun) wantGPU(version, digest string) error {
	var problems []error
	for _, m := range []string{"nvidia", "nvidia-uvm", "nvidia-modeset"} {
		if !slices.Contains(r.live, m) {
			problems = append(problems, fmt.Errorf("%s is not live in the node's kernel", m))
		}
	}
	v := r.report.Verdict
	if v.NVML.Version != version {
		problems = append(problems, fmt.Errorf("NVML answers version %q (%s); want %s", v.NVML.Version, v.NVML.Error, version))
	}
	if v.Digest != digest {
		problems = append(problems, fmt.Errorf("the node runs %s; built %s", v.Digest, digest))
	}
	if want := fault.Unusable.ExitCode(); r.code != want {
		problems = append(problems, fmt.Errorf("exit code %d; want %d", r.code, want))
	}
	return errors.Join(problems...)
}
