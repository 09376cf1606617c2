package pipeline

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/gate"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/timeline"
)

// sumsFile lies beside the modules in the cache, in the form of sha256sum: what
// left the compiler is compared with it before anything is proved about it, and
// again before it is packed.
const sumsFile = "SHA256SUMS"

// compile makes the modules, or finds them made by an earlier build of the
// same inputs.
func (r *run) compile(ctx context.Context) (note string, err error) {
	source, err := r.release.Source(r.req.Flavour)
	if err != nil {
		return "", err
	}
	work, cleanup, err := r.products.TempDir("compile-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, cleanup()) }()
	var phases []timeline.Phase
	key, why := r.modulesKey(), ""
	dir, cached, err := r.products.Tree(ctx, "modules", key.String(), func(ctx context.Context, dir string) error {
		if why = r.products.Missed(fmt.Sprintf("modules of %s, %s", r.kernel.Kernel, r.res.Driver), key); why != "" {
			fmt.Fprintf(r.log, "made anew: not the %s of the last build of this cell\n", why)
		}
		if wait := r.cfg.Compiling; wait != nil && !wait.TryAcquire(1) {
			began := time.Now().UTC()
			r.line.Say("compile", "waits for another cell's compile")
			if err := wait.Acquire(ctx, 1); err != nil {
				return context.Cause(ctx)
			}
			phases = append(phases, timeline.Phase{Name: "wait", Start: began, Seconds: time.Since(began).Seconds()})
		}
		release := sync.OnceFunc(func() {
			if r.cfg.Compiling != nil {
				r.cfg.Compiling.Release(1)
			}
		})
		defer release()
		if err := r.products.Room(r.cfg.Room); err != nil {
			return err
		}
		if b := sandbox.Bounds(); !b.ControlGroup {
			fmt.Fprintf(r.log, "each process of the compile is bounded, not all together: %v\n", b.Why)
		}
		ctx, cancel := context.WithTimeoutCause(ctx, r.cfg.CompileTimeout,
			fault.New(fault.TimedOut, fmt.Sprintf("compile ran longer than %v", r.cfg.CompileTimeout), "raise --compile-timeout"))
		defer cancel()
		made, err := compile.Modules(ctx, compile.Request{
			Source: source, Headers: r.kernel.Headers, Toolchain: r.kernel.Toolchain, Env: r.kernel.Env,
			Release: r.kernel.Kernel.Release, Driver: r.res.Driver, Arch: r.kernel.Kernel.Arch,
			Jobs: r.cfg.Jobs, WorkDir: work, Log: r.log,
			Debug: r.cfg.DebugSymbols, BTF: r.kernel.BTF,
			Cache: r.products, HeaderDigest: r.kernel.HeadersDigest, ToolchainDigest: r.kernel.ToolchainDigest, SourceDigest: r.release.SourceDigest, HostDigest: r.host,
			Progress: func(phase string, done, total int) { r.line.Say("compile", "%s %d/%d", phase, done, total) },
		})
		release()
		// A tree that changed under the compiler explains every error, and
		// makes every success worthless.
		r.inputs = []string{r.kernel.Headers, r.kernel.Toolchain, source}
		if r.kernel.BTF != "" {
			r.inputs = append(r.inputs, r.kernel.BTF)
		}
		for _, input := range r.inputs {
			if err := r.cfg.Cache.Recheck(ctx, input); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
		phases = append(phases, made.Phases...)
		sums := map[string]string{}
		for _, name := range slices.Sorted(maps.Keys(made.Modules)) {
			path := filepath.Join(dir, name+".ko")
			if err := gate.Stamp(path, made.Modules[name], r.kernel.Fingerprint); err != nil {
				return err
			}
			var err error
			if sums[name], err = hostfile.Sum(path); err != nil {
				return err
			}
		}
		if err := keepDebug(dir, made.Debug); err != nil {
			return err
		}
		return writeSums(dir, sums)
	})
	if err != nil {
		return "", err
	}
	r.debugDir = filepath.Join(dir, debugFolder)
	for _, p := range phases {
		p.Of = "compile"
		r.line.Add(p)
	}
	if err := r.findModules(dir); err != nil {
		return "", err
	}
	if cached {
		return fmt.Sprintf("%d modules, cached", len(r.modules)), nil
	}
	if why != "" {
		return fmt.Sprintf("%d modules, other %s", len(r.modules), why), nil
	}
	return fmt.Sprintf("%d modules", len(r.modules)), nil
}

// modulesKey is everything that decides the bytes of the compiled modules, in the
// words in which a build says what changed.
func (r *run) modulesKey() *cas.Key {
	key := cas.NewKey("modules").Add("kernel fingerprint", string(r.kernel.Fingerprint)).Add("driver sources", r.release.SourceDigest).
		Add("flavour", string(r.req.Flavour)).Add("host tools", r.host).Add("compile recipe", compile.Recipe).Add("stamp recipe", gate.Recipe)
	if r.cfg.DebugSymbols {
		key.Add("debug symbols", debugFolder)
	}
	if r.pahole != "" {
		key.Add("pahole", r.pahole)
	}
	return key
}

func writeSums(dir string, sums map[string]string) error {
	var text bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(sums)) {
		fmt.Fprintf(&text, "%s  %s.ko\n", sums[name], name)
	}
	return os.WriteFile(filepath.Join(dir, sumsFile), text.Bytes(), 0o644)
}

// findModules reads which modules a folder holds, and what they have to be.
func (r *run) findModules(dir string) error {
	raw, err := os.ReadFile(filepath.Join(dir, sumsFile))
	if err != nil {
		return err
	}
	r.modules, r.sums = map[string]string{}, map[string]string{}
	for lines := bufio.NewScanner(bytes.NewReader(raw)); lines.Scan(); {
		sum, file, ok := strings.Cut(lines.Text(), "  ")
		name, isModule := strings.CutSuffix(file, ".ko")
		if !ok || !isModule {
			return fault.New(fault.Internal, fmt.Sprintf("read %s: line %q", sumsFile, lines.Text()), "")
		}
		r.modules[name], r.sums[name] = filepath.Join(dir, file), sum
	}
	return nil
}

// changed is the error about a module that is not what the compiler left.
func changed(name, dir string) error {
	return fault.New(fault.Transient, fmt.Sprintf("module %s was damaged in the cache since it was compiled", name), "run it again: it is made anew; check the disk of "+dir)
}
