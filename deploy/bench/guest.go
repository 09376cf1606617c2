package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/vm"
)

// guest measures how long the virtual node takes from the start of the fetcher until the modules are loaded. For
// comparison, it measures insmod of the same modules from files that are already on the node. Both times are in seconds
// of the guest's clock, which does not depend on the emulator's speed (see CountInstructions of package vm).
func (b *bench) guest(ctx context.Context) (err error) {
	if err := b.UseFastEmulator(ctx); err != nil {
		return err
	}
	m := &testbed.Mirror{Dir: b.mirror.Dir}
	srv, err := b.StartServer(ctx, filepath.Join(b.Dir, "guest-server"), m)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, srv.Kill()) }()
	c := cell{kernel: b.mirror.Builds[1], driver: b.mirror.Drivers[0].Version}
	layers, err := b.publish(ctx, srv, c)
	if err != nil {
		return err
	}
	boot, err := b.Boot(ctx, m, c.kernel.Kernel)
	if err != nil {
		return err
	}
	dir := filepath.Join(b.Dir, "guest-modules")
	if err := unpackLayer(ctx, layers[0], dir); err != nil {
		return err
	}
	node := testbed.Node{Kernel: c.kernel.Kernel, Boot: boot, GPU: true, Key: b.key + ".pub", Console: b.Out,
		CountInstructions: true}
	// "builder build" published the driver without the queue, so the server's catalogue does not have it. The fetcher
	// therefore gets the name of the registry.
	registry := strings.Replace(srv.Repository(), "127.0.0.1", vm.HostAddress, 1)
	for range b.runs {
		install := testbed.InstallStep(srv, "--driver", c.driver, "--flavour", "proprietary", "--registry", registry)
		res, err := b.RunNode(ctx, node, []vm.Step{install, testbed.ModulesStep()})
		if err != nil {
			return err
		}
		step, err := testbed.StepNamed(res, "install")
		if err != nil {
			return err
		}
		var r testbed.Report
		if err := testbed.Decode(step, &r); err != nil {
			return err
		}
		loaded, err := untilLoaded(r.Phases)
		if err != nil {
			return fmt.Errorf("install the driver in the guest: %w: %s", err, step.Stderr)
		}
		live, err := testbed.StepNamed(res, "modules")
		if err != nil {
			return err
		}
		byHand := node
		var steps []vm.Step
		// /proc/modules lists the modules in the reverse order of their loading. The steps load them in the original order,
		// because a module needs the modules that were loaded before it.
		for _, name := range testbed.Live(live.Stdout) {
			f := vm.File{Name: "/modules/" + name + ".ko", Path: filepath.Join(dir, "drivers", name+".ko"), Mode: 0o644}
			byHand.Files = append(byHand.Files, f)
			steps = append([]vm.Step{{Argv: []string{"@insmod", f.Name}}}, steps...)
		}
		if res, err = b.RunNode(ctx, byHand, steps); err != nil {
			return err
		}
		alone := 0.0
		for _, s := range res.Steps {
			if s.ExitCode != 0 {
				return fmt.Errorf("run the step %q in the guest: %s", s.Name, s.Error)
			}
			alone += s.Seconds
		}
		b.loaded.ours, b.loaded.theirs = append(b.loaded.ours, loaded), append(b.loaded.theirs, alone)
		b.loadedPhases = r.Phases
	}
	return nil
}

// untilLoaded returns the seconds from the beginning of a run to the end of its phase "load", which must exist.
func untilLoaded(phases []timeline.Phase) (float64, error) {
	for _, p := range phases {
		if p.Name == "load" && p.Of == "" {
			return p.Start.Sub(phases[0].Start).Seconds() + p.Seconds, nil
		}
	}
	return 0, errors.New("the run on the node has no phase load")
}

// unpackLayer unpacks a layer from the builder's cache.
func unpackLayer(ctx context.Context, l bundle.Layer, dir string) (err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	f, err := os.Open(l.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	return bundle.Unpack(ctx, f, l.Digest, l.DiffID, l.Size, root)
}

func (b *bench) printGuest(out io.Writer) {
	if len(b.loaded.ours) == 0 {
		return
	}
	b.loaded.what, b.loaded.unit = "virtual node: start to modules loaded", "s at 1 ns an instruction"
	b.loaded.alternative = "insmod of the same modules, which lie there"
	b.loaded.print(out)
	for _, p := range b.loadedPhases {
		if p.Of == "" {
			fmt.Fprintf(out, "        %-10s %5.1f s  %s\n", p.Name, p.Seconds, p.Note)
		}
	}
}
