// Command demo runs Prebake's main job on one machine, with real programs, a real kernel and a real driver:
//   - It makes a mirror from Debian's packages that looks like COS's buckets.
//   - It starts a server, and a builder that builds a real NVIDIA driver for a real kernel.
//   - It boots a virtual COS node, which finds, verifies, installs and loads the driver.
//   - It prints PASS or FAIL, and what the run proved.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

func main() {
	cli.Main(&ucli.Command{
		Name:  "demo",
		Usage: "build, publish, fetch and load a real driver on one machine",
		Description: `Ends with PASS and exit status 0, or with FAIL, the reason and another status.
Downloads and caches are kept, so that the next run is quick; "make clean-cache"
removes them.`,
		Flags: []ucli.Flag{
			&ucli.StringFlag{Name: "bin", Value: "bin", Usage: "`FOLDER` with the product's programs"},
			&ucli.StringFlag{
				Name: "flavour", Value: string(target.Proprietary), Usage: "`FLAVOUR` of the driver: proprietary or open",
			},
			&ucli.BoolFlag{
				Name: "stay", Usage: "keep server and builder running after PASS until Ctrl-C, and print commands to try",
			},
			&ucli.BoolFlag{Name: "console", Usage: "show the virtual node's console"},
		},
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			d := &demo{
				out: cmd.Root().Writer, start: time.Now(),
				flavour: target.Flavour(cmd.String("flavour")), stay: cmd.Bool("stay"),
			}
			if d.flavour != target.Proprietary && d.flavour != target.Open {
				return fault.New(fault.Usage, fmt.Sprintf("flavour %q: want proprietary or open", d.flavour),
					"give --flavour proprietary or --flavour open")
			}
			if cmd.Bool("console") {
				d.console = cmd.Root().ErrWriter
			}
			return d.play(ctx, cmd.String("bin"))
		},
	})
}

// demo is one run of the demo, with its results so far.
type demo struct {
	out     io.Writer
	console io.Writer
	flavour target.Flavour
	stay    bool
	start   time.Time
	step    string // description of the current step, for a person

	scene  *testbed.Scene
	mirror *testbed.Mirror
	srv    *testbed.Server
	key    string // file with the builder's private key; the public key is beside it

	version string        // version of the driver
	kernel  target.Kernel // kernel of the node
	build   api.Build     // build of the driver for kernel
	// second is the build of the same driver for sibling, a kernel of the same upstream version. second and sibling are
	// zero if Debian's archive has no such kernel.
	sibling target.Kernel
	second  api.Build
	bare    *nodeRun // the fetcher's run before the node has a GPU
	gpu     *nodeRun // the fetcher's run with the emulated GPU
}

// begin prints that a step begins.
func (d *demo) begin(format string, args ...any) {
	d.step = fmt.Sprintf(format, args...)
	fmt.Fprintf(d.out, "\n== %.0f s: %s\n", time.Since(d.start).Seconds(), d.step)
}

// play runs the demo in a temporary folder, and prints PASS or FAIL.
func (d *demo) play(ctx context.Context, bin string) (err error) {
	dir, err := os.MkdirTemp("", "prebake-demo-")
	if err != nil {
		return err
	}
	d.step = "set-up"
	err = d.run(ctx, bin, dir)
	if err != nil {
		err = d.fail(ctx, err, dir)
	}
	return errors.Join(err, os.RemoveAll(dir))
}

func (d *demo) run(ctx context.Context, bin, dir string) (err error) {
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	if d.scene, err = testbed.New(bin, dir, os.Stderr); err != nil {
		return err
	}
	d.begin("make a mirror that looks like COS's buckets, out of Debian's packages")
	if err := d.makeMirror(ctx); err != nil {
		return err
	}

	d.begin("start the server and one builder")
	d.key = filepath.Join(dir, "prebake.key")
	if _, err := d.scene.Must(ctx, "builder", "keygen", d.key); err != nil {
		return err
	}
	if d.srv, err = d.scene.StartServer(ctx, filepath.Join(dir, "server"), d.mirror); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.srv.Stop()) }()
	worker, err := d.scene.StartWorker(d.srv, d.mirror, d.key, d.scene.BuildCache())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, worker.Stop()) }()
	fmt.Fprintf(d.out, "the server's page: %s\n", d.page())

	d.begin("build driver %s (%s) for COS build %s", d.version, d.flavour, d.kernel)
	if d.build, err = d.request(ctx, d.kernel); err != nil {
		return err
	}
	if d.hasSibling() {
		d.begin("build the same driver for COS build %s, whose kernel is nearly the same", d.sibling)
		if d.second, err = d.request(ctx, d.sibling); err != nil {
			return err
		}
		if err := wantRemembered(d.second.Phases); err != nil {
			return err
		}
	}
	if err := d.node(ctx); err != nil {
		return err
	}

	d.step = "print the result"
	if err := d.pass(); err != nil {
		return err
	}
	if d.stay {
		d.step = "stay"
		if err := d.suggest(); err != nil {
			return err
		}
		<-ctx.Done()
		fmt.Fprintln(d.out, "stopping the builder and the server")
	}
	return nil
}

// makeMirror makes the mirror, and chooses a driver and kernels from it.
func (d *demo) makeMirror(ctx context.Context) (err error) {
	if d.mirror, err = d.scene.Mirror(ctx); err != nil {
		return err
	}
	d.version = d.mirror.Drivers[0].Version
	older, newer, ok := d.mirror.Siblings()
	if ok && d.flavour != target.Open {
		d.kernel, d.sibling = older, newer
	} else { // the open flavour of this driver does not support the newest kernels
		d.kernel = d.mirror.Builds[1].Kernel
	}
	fmt.Fprintf(d.out, "%d COS builds, %d drivers in %s\n", len(d.mirror.Builds), len(d.mirror.Drivers), d.mirror.Dir)
	return nil
}

func (d *demo) hasSibling() bool { return d.sibling != target.Kernel{} }

// page returns the URL of the server's page.
func (d *demo) page() string { return "http://" + d.srv.Addr + "/" }

// request asks the server for the driver of one kernel, and waits until the build has ended.
func (d *demo) request(ctx context.Context, k target.Kernel) (api.Build, error) {
	b, err := d.srv.Client.RequestBuild(ctx, api.BuildRequest{
		BuildID: k.BuildID, Board: k.Board, Driver: d.version, Flavour: string(d.flavour),
	})
	if err != nil {
		return b, err
	}
	began := time.Now()
	b, err = testbed.WaitBuild(ctx, d.srv.Client, b.ID, func(b api.Build) {
		fmt.Fprintf(d.out, "%7.1f s  %s\n", time.Since(began).Seconds(), strings.TrimSpace(string(b.State)+" "+b.Phase))
	})
	if err != nil {
		return b, err
	}
	if b.State != api.Published {
		return b, fmt.Errorf("build %d ended as %s (class %s): %s", b.ID, b.State, b.Class, b.Error)
	}
	return b, nil
}

// node boots the node, and checks its results without a GPU and with the emulated GPU.
func (d *demo) node(ctx context.Context) (err error) {
	d.begin("boot a virtual COS node: find, verify, install and load the driver")
	boot, err := d.scene.Boot(ctx, d.mirror, d.kernel)
	if err != nil {
		return err
	}
	disk, err := openDisk(ctx, filepath.Join(d.scene.State, "demo"), d.scene.Dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, disk.close(err == nil)) }()
	if err := d.boot(ctx, boot, disk); err != nil {
		return err
	}
	return errors.Join(d.bare.wantNoDevice(), d.gpu.wantGPU(d.version, d.build.Digest))
}

// reusedPhases returns the phases of a build that used an earlier result. Their notes contain "cached".
func reusedPhases(b api.Build) (phases []string) {
	for _, p := range b.Phases {
		if p.Of == "" && strings.Contains(p.Note, "cached") {
			phases = append(phases, p.Name)
		}
	}
	return slices.Compact(phases)
}
