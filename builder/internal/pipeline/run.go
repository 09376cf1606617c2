package pipeline

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
)

// run is one build: its settings, its log and its result so far.
type run struct {
	cfg     Config
	req     Request
	log     io.Writer
	kept    *logCopy // a copy of log for publishing; nil in Make, which signs nothing
	line    *timeline.Run
	started time.Time
	res     Result

	// products is the cache for everything that the build publishes. It is Config.Cache, except in Make and after
	// startFresh. Config.Cache always has what is not published: fetched inputs, boot folders and verdicts.
	products *cas.Cache
	// again is true in a renewal (see Config.RebuildAfter), which must not use cached modules. modulesMade has the
	// functions that remove the folders of modules that a renewal made.
	again       bool
	modulesMade []func() error
	// endFresh is the function that startFresh returned, or nil.
	endFresh func()
	// recipe is the recipe for the layers. If the recipe of the published artifact is not certain, wanted is the
	// artifact's digest. Then pack tries all recipes.
	recipe, wanted string
	// otherPahole is set if the published modules have BTF by another pahole, see comparePahole.
	otherPahole otherPahole
}

// Run builds and publishes one cell. It writes the whole output of all tools to log. After an error, the Result has
// everything up to the failure.
func Run(ctx context.Context, cfg Config, req Request, log io.Writer, line *timeline.Run) (*Result, error) {
	cfg = cfg.withDefaults(req)
	r := &run{cfg: cfg, req: req, line: line, started: time.Now().UTC(), products: cfg.Cache,
		recipe: cmp.Or(req.PackRecipe, bundle.PackRecipe)}
	defer cfg.Cache.Begin()() // the cache keeps everything that this build uses until the build ends
	kept, err := newLogCopy(cfg.Cache)
	if err != nil {
		return &r.res, fault.CacheDisk(fmt.Errorf("make a file for the log: %w", err))
	}
	defer func() { _ = kept.close() }() // a failure is ignored: the next Open of the cache removes the file
	r.kept, r.log = kept, io.MultiWriter(log, kept)
	defer func() {
		if r.endFresh == nil {
			return
		}
		r.endFresh()
		for i := range r.res.Layers {
			r.res.Layers[i].Path = "" // the file does not outlive the pass
		}
	}()
	if err = r.runPhases(ctx); err != nil {
		fmt.Fprintf(log, "\nbuild failed (%v): %v\n", fault.Of(err), err)
	}
	r.res.Phases = line.Phases()
	return &r.res, err
}

// runPhases runs all phases, from the buckets to the published artifact.
func (r *run) runPhases(ctx context.Context) error {
	in, err := phase(r, "source", func() (*inputs, string, error) { return r.source(ctx) })
	if err != nil {
		return err
	}
	to, err := phase(r, "look up", func() (*publication, string, error) { return r.lookUp(ctx, in) })
	defer func() { _ = to.close() }() // each write was closed, and its error reported, before
	if err != nil {
		return err
	}
	a, m := to.found, (*modules)(nil)
	if a == nil {
		if a, m, err = r.makeArtifact(ctx, in, to); err != nil {
			r.keepRefused(in, to, "", err)
			return err
		}
	}
	_, err = phase(r, "publish", func() (_ struct{}, note string, err error) {
		note, err = r.publish(ctx, in, to, m, a)
		return struct{}{}, note, r.otherPahole.explain(a.digest, err)
	})
	if err != nil {
		r.keepRefused(in, to, a.digest, err)
	}
	return err
}

// makeArtifact makes and signs the artifact. It runs if there is no published artifact to reuse.
func (r *run) makeArtifact(ctx context.Context, in *inputs, to *publication) (*artifact, *modules, error) {
	var early *earlyLayers
	if in.prebuilt == nil {
		early = r.packEarly(ctx, in) // user space and firmware do not depend on the modules
		defer early.end()
	}
	m, err := r.makeModules(ctx, in, to.signing)
	if err != nil {
		return nil, nil, err
	}
	tested, err := phase(r, "load test", func() (testOutcome, string, error) { return r.loadTest(ctx, in, m) })
	if err != nil {
		return nil, nil, err
	}
	layers, err := phase(r, "package", func() ([]bundle.Layer, string, error) { return r.pack(ctx, in, m, early) })
	if err != nil {
		return nil, nil, err
	}
	a, err := phase(r, "sign", func() (*artifact, string, error) { return r.sign(ctx, in, to, m, tested, layers) })
	return a, m, err
}

// makeModules compiles the modules, or uses Google's modules. It signs them if a key or Google's signatures are
// available, and checks them against the kernel.
func (r *run) makeModules(ctx context.Context, in *inputs, s signing) (m *modules, err error) {
	if in.prebuilt != nil {
		m, err = phase(r, "take modules", func() (*modules, string, error) { return takeModules(in) })
	} else {
		m, err = phase(r, "compile", func() (*modules, string, error) { return r.compile(ctx, in) })
	}
	if err == nil && (s.own != nil || in.google != nil) {
		m, err = phase(r, "sign modules", func() (*modules, string, error) { return r.signModules(ctx, in, s, m) })
	}
	if err == nil {
		m.identity, err = phase(r, "check", func() (bundle.Identity, string, error) { return r.check(ctx, in, m) })
	}
	return m, err
}

// phase runs one phase of a build and records it in the timeline. The callback returns the value that phase returns,
// and the note for the timeline.
func phase[T any](r *run, name string, do func() (T, string, error)) (made T, err error) {
	fmt.Fprintf(r.log, "\n== %s\n", name)
	err = r.line.Do(name, func() (note string, err error) {
		made, note, err = do()
		return note, err
	})
	if err != nil {
		err = fmt.Errorf("%s: %w", name, err)
	}
	return made, err
}

// progress returns a function that writes a text to the log and to the progress display of a phase.
func (r *run) progress(phase string) func(string) {
	return func(text string) {
		fmt.Fprintln(r.log, text)
		r.line.Progress(phase, "%s", text)
	}
}
