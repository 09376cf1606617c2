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
	"github.com/prebake/prebake/builder/internal/modcheck"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/timeline"
)

// sumsFile is a file next to the modules in the cache, in the format of sha256sum. The pipeline compares the modules
// with it before the checks and before packing, to detect damaged files.
const sumsFile = "SHA256SUMS"

// modules describes the modules of one driver in the cache.
type modules struct {
	files map[string]string // the paths of the modules, by name
	sums  map[string]string // the SHA-256 of the modules in hex, by name
	// debug is the path of the folder with the unstripped modules. It exists only with Config.DebugSymbols.
	debug string
	// madeOf lists the paths of the inputs from which this run compiled the modules. It is empty for cached modules.
	madeOf []string
	// signer says who signed the modules. signedBy lists everything that decides the bytes of the signatures, for cache
	// keys.
	signer   moduleSigner
	signedBy []string
	// identity is the artifact's identity, which the check phase sets.
	identity bundle.Identity
}

// key returns the cache key of a product made from the signed modules and the given texts.
func (m *modules) key(in *inputs, more ...string) string {
	return in.stampedKey(slices.Concat(more, m.signedBy, m.sumList())...)
}

// sumList returns the checksums of the modules, as parts of the cache keys of products. So a run that compiled again
// does not use a product that was made from other modules.
func (m *modules) sumList() (list []string) {
	for _, name := range slices.Sorted(maps.Keys(m.sums)) {
		list = append(list, name+" "+m.sums[name])
	}
	return list
}

// compile compiles the modules, or returns those in the cache.
func (r *run) compile(ctx context.Context, in *inputs) (m *modules, note string, err error) {
	source, err := in.release.Source(r.req.Flavour)
	if err != nil {
		return nil, "", err
	}
	work, cleanup, err := r.products.TempDir("compile-")
	if err != nil {
		return nil, "", err
	}
	defer func() { err = errors.Join(err, cleanup()) }()
	var phases []timeline.Phase
	var madeOf []string
	key, why := r.modulesKey(in), ""
	about := fmt.Sprintf("modules of %s, %s, debug symbols %t, BTF %t", in.kernel.Kernel, in.driver, r.cfg.DebugSymbols,
		in.pahole != "")
	dir, cached, err := r.moduleTree(ctx, "modules", key.String(), func(ctx context.Context, dir string) error {
		if why = r.products.MissReason(about, key); why != "" {
			fmt.Fprintf(r.log, "compiled again: this input changed since the last build of this cell: %s\n", why)
		}
		if wait := r.cfg.Compiling; wait != nil && !wait.TryAcquire(1) {
			began := time.Now().UTC()
			r.line.Progress("compile", "waits for another cell's compile")
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
		if err := r.products.CheckFree(r.cfg.MinFree); err != nil {
			return err
		}
		if b := sandbox.SupportedLimits(); !b.ControlGroup {
			fmt.Fprintf(r.log, "the limits of the sandbox hold for each process of the compile, not for all processes "+
				"together: %v\n", b.Reason)
		}
		ctx, cancel := context.WithTimeoutCause(ctx, r.cfg.CompileTimeout,
			fault.New(fault.TimedOut, fmt.Sprintf("the modules took longer than %v to compile", r.cfg.CompileTimeout),
				"set a longer --compile-timeout"))
		defer cancel()
		made, err := compile.Modules(ctx, compile.Request{
			Source: source, Headers: in.kernel.Headers, Toolchain: in.kernel.Toolchain, Env: in.kernel.Env,
			Release: in.kernel.Kernel.Release, Driver: in.driver, Arch: in.kernel.Kernel.Arch,
			Jobs: r.cfg.Jobs, WorkDir: work, Log: r.log,
			Debug: r.cfg.DebugSymbols, BTF: in.kernel.BTF,
			Cache: r.products, HeaderDigest: in.kernel.HeadersDigest, ToolchainDigest: in.kernel.ToolchainDigest,
			SourceDigest: in.release.SourceDigest, HostDigest: in.host,
			Progress: func(phase string, done, total int) { r.line.Progress("compile", "%s %d/%d", phase, done, total) },
		})
		release() // the rest compiles nothing
		// Check the inputs before the error: a change during the compile explains any error, and makes a success worthless.
		madeOf = []string{in.kernel.Headers, in.kernel.Toolchain, source}
		if in.kernel.BTF != "" {
			madeOf = append(madeOf, in.kernel.BTF)
		}
		for _, input := range madeOf {
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
			if err := modcheck.Stamp(path, made.Modules[name], in.kernel.Fingerprint); err != nil {
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
		return nil, "", err
	}
	r.products.Used(about, key)
	for _, p := range phases {
		p.Of = "compile"
		r.line.Add(p)
	}
	if m, err = readModules(dir); err != nil {
		return nil, "", err
	}
	m.debug, m.madeOf = filepath.Join(dir, debugFolder), madeOf
	note = fmt.Sprintf("%d modules", len(m.files))
	switch {
	case cached:
		note += ", cached"
	case why != "":
		note += ", changed: " + why
	}
	return m, note, nil
}

// modulesKey returns the cache key of the compiled modules. If a part of the key changed since the last build of the
// cell, the log shows the name of that part.
func (r *run) modulesKey(in *inputs) *cas.Key {
	key := cas.NewKey("modules").Add("kernel fingerprint", string(in.kernel.Fingerprint)).Add("driver sources",
		in.release.SourceDigest).
		Add("flavour", string(r.req.Flavour)).Add("host tools", in.host).Add("compile recipe",
		compile.Recipe).Add("stamp recipe", modcheck.Recipe)
	if r.cfg.DebugSymbols {
		key.Add("debug symbols", debugFolder)
	}
	if in.pahole != "" {
		key.Add("pahole", in.pahole)
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

// readModules returns the paths of the modules in a folder, with their expected checksums.
func readModules(dir string) (*modules, error) {
	raw, err := os.ReadFile(filepath.Join(dir, sumsFile))
	if err != nil {
		return nil, err
	}
	m := &modules{files: map[string]string{}, sums: map[string]string{}}
	for lines := bufio.NewScanner(bytes.NewReader(raw)); lines.Scan(); {
		sum, file, ok := strings.Cut(lines.Text(), "  ")
		name, isModule := strings.CutSuffix(file, ".ko")
		if !ok || !isModule {
			return nil, fault.New(fault.Internal, fmt.Sprintf("read %s: line %q is not a checksum and the name of a module",
				sumsFile, lines.Text()), "")
		}
		m.files[name], m.sums[name] = filepath.Join(dir, file), sum
	}
	return m, nil
}

// checkIntact returns an error if a module or one of the given cache folders changed since it was made.
func (r *run) checkIntact(ctx context.Context, m *modules, folders ...string) error {
	for _, name := range slices.Sorted(maps.Keys(m.files)) {
		sum, err := hostfile.Sum(m.files[name])
		if err != nil {
			return err
		}
		if sum != m.sums[name] {
			return changedError(name, r.products.Dir())
		}
	}
	caches := []*cas.Cache{r.cfg.Cache}
	if r.products != r.cfg.Cache {
		caches = append(caches, r.products)
	}
	for _, dir := range folders {
		for _, cache := range caches { // only the folder's own cache checks it
			if err := cache.Recheck(ctx, dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// changedError returns the error for a module that changed in the cache since it was made.
func changedError(name, dir string) error {
	return fault.New(fault.Transient, fmt.Sprintf("module %s changed in the cache during this build", name),
		"check the disk of "+dir+"; then run the command again, which makes the module again")
}
