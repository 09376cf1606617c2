// Package compile turns module sources into .ko files with the kernel's own
// build system, in a sandbox whose paths, environment, user and host name are
// the same on every machine, so that equal inputs give equal bytes. It refuses
// to fetch anything, to judge whether a module fits the kernel (pkg/modinfo
// does), and to compile outside the sandbox.
//
// Inside the sandbox the kernel's header tree is /prebake/kernel, the toolchain
// /prebake/toolchain (both read-only), a copy of the sources /prebake/src, and
// the results go to /prebake/out.
package compile

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/builder/internal/untrusted"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// Recipe names the way modules are made here. It goes into cache keys: raise the
// number with any change that may change the bytes that come out.
const Recipe = "compile-3"

// Request is one compilation. Source, Headers, Toolchain, Release, Arch and
// WorkDir are needed.
type Request struct {
	// Source is the folder of module sources (NVIDIA's kernel/ or kernel-open/,
	// or one with a Kbuild file for External). It is copied, never written.
	Source string
	// Headers is the root of the kernel's header tree; Toolchain that of the
	// unpacked toolchain archive. Both are shown read-only.
	Headers, Toolchain string
	// Env is toolchain_env: CC, CXX and, where given, LD, AR, NM, OBJCOPY,
	// OBJDUMP and STRIP by name. Without a CC the toolchain's gcc is taken.
	Env map[string]string
	// Release is `uname -r` of the kernel.
	Release string
	// Driver is what Source holds; only Modules needs it, for its messages.
	Driver target.Driver
	Arch   target.Arch
	// Jobs is make's -j; 0 means the number of CPUs. It does not change the result.
	Jobs int
	// Debug keeps debug information: Result.Debug has the modules before
	// stripping. It does not change the stripped ones.
	Debug bool
	// BTF is a file with the description of the kernel's types; the modules get
	// one of theirs that goes on where it ends. "" is none.
	BTF string
	// Cache stores what conftest found out and what was compiled, for the
	// same and for sibling kernels; nil does all the work again. It does not
	// change the result. With it the digests are needed: the first three name the
	// content of those folders, SourceDigest for all flavours of Driver; HostDigest
	// names the host's programs, see [sandbox.HostTools]. A HeaderDigest may leave
	// out compile.h and utsversion.h.
	Cache                                                   *cas.Cache
	HeaderDigest, ToolchainDigest, SourceDigest, HostDigest string
	// WorkDir is an empty folder on a disk with 1 GiB to spare. It holds src/, out/,
	// modules/ and more afterwards, and belongs to the caller.
	WorkDir string
	// Log receives the whole output of the run; nil drops it.
	Log io.Writer
	// Progress is called with counts while a phase runs; total is 0 where it is
	// not known. It may be nil, and is never called concurrently.
	Progress func(phase string, done, total int)
}

// Result is what a compilation left.
type Result struct {
	// Modules maps a module's file name without .ko to the path of the stripped
	// file in WorkDir/modules, mode 0644, where no sandbox could write.
	Modules map[string]string
	// Debug maps them to the files before stripping, in WorkDir/debug, with the
	// same build ids.
	// It is empty without Request.Debug.
	Debug map[string]string
	// Phases are conftest, compile, link, types and strip, as far as each took place.
	Phases []timeline.Phase
}

// Modules compiles NVIDIA's kernel modules. On an error the result holds the
// phases up to it and no modules. A driver that does not know the kernel's
// interfaces gives fault.APIBreak with the compiler's first error as its text.
func Modules(ctx context.Context, r Request) (*Result, error) {
	result, err := run(ctx, r, func(t tools) []string {
		args := []string{"make", "modules", "SYSSRC=" + insideKernel, "SYSOUT=" + insideKernel,
			"KERNEL_UNAME=" + r.Release, "IGNORE_CC_MISMATCH=1"}
		// As Google's installer does for kernels without MODVERSIONS, such as COS's:
		// their Module.symvers has no checksums. That it is there, and names
		// symbols, is cossrc's to see.
		if !t.modVersions {
			args = append(args, "IGNORE_MISSING_MODULE_SYMVERS=1")
		}
		return args
	})
	if err != nil {
		err = fmt.Errorf("compile %s for %s: %w", r.Driver, r.Release, err)
	}
	return result, err
}

// External compiles any other small out-of-tree module that has its own Kbuild
// file, in the same sandbox.
func External(ctx context.Context, r Request) (*Result, error) {
	result, err := run(ctx, r, func(tools) []string {
		return []string{"make", "-C", insideKernel, "M=" + insideSource, "modules"}
	})
	if err != nil {
		err = fmt.Errorf("compile %s for %s: %w", filepath.Base(r.Source), r.Release, err)
	}
	return result, err
}

var releasePattern = regexp.MustCompile(`^[0-9][A-Za-z0-9._+~-]{0,63}$`)

func (r Request) withDefaults() (Request, error) {
	var errs []error
	if r.BTF != "" {
		if info, err := os.Stat(r.BTF); err != nil {
			errs = append(errs, fmt.Errorf("types: %w", err))
		} else if !info.Mode().IsRegular() {
			errs = append(errs, fmt.Errorf("types %s: not a file", r.BTF))
		}
	}
	for _, dir := range []struct {
		name string
		path *string
	}{{"source", &r.Source}, {"headers", &r.Headers}, {"toolchain", &r.Toolchain}, {"work", &r.WorkDir}} {
		if info, err := os.Stat(*dir.path); err != nil {
			errs = append(errs, fmt.Errorf("%s folder: %w", dir.name, err))
		} else if !info.IsDir() {
			errs = append(errs, fmt.Errorf("%s folder %s: not a folder", dir.name, *dir.path))
		}
		abs, err := filepath.Abs(*dir.path)
		if err != nil {
			errs = append(errs, err)
		}
		*dir.path = abs
	}
	if !releasePattern.MatchString(r.Release) {
		errs = append(errs, fmt.Errorf("kernel release %q: want it as uname -r prints it", r.Release))
	}
	if _, ok := kernelArch[r.Arch]; !ok {
		errs = append(errs, fmt.Errorf("architecture %q: want amd64 or arm64", r.Arch))
	}
	if r.Jobs < 0 {
		errs = append(errs, fmt.Errorf("jobs %d: want 0 or more", r.Jobs))
	}
	if left, err := fs.ReadDir(hostFS(r.WorkDir), "."); err == nil && len(left) > 0 {
		errs = append(errs, fmt.Errorf("work folder %s: not empty", r.WorkDir))
	}
	if r.Cache != nil && (r.HeaderDigest == "" || r.ToolchainDigest == "" || r.SourceDigest == "" || r.HostDigest == "") {
		errs = append(errs, errors.New("cache without the digests of headers, toolchain, source and host tools"))
	}
	if r.Jobs == 0 {
		r.Jobs = runtime.NumCPU()
	}
	if r.Log == nil {
		r.Log = io.Discard
	}
	if r.Progress == nil {
		r.Progress = func(string, int, int) {}
	}
	return r, errors.Join(errs...)
}

// build is one running compilation.
type build struct {
	r        Request
	t        tools
	src, out string
	box      sandbox.Config // make's, without its arguments and output
	args     []string       // make's command line, less -j
	debug    bool           // with debug information
	watch    *watch
}

// run stages the sources, compiles with the make command given, and strips.
func run(ctx context.Context, r Request, command func(tools) []string) (result *Result, err error) {
	result = &Result{Modules: map[string]string{}, Debug: map[string]string{}}
	defer func() { err = stopped(ctx, err) }()
	r, err = r.withDefaults()
	if err != nil {
		return result, err
	}
	t, err := findTools(r)
	if err != nil {
		return result, err
	}
	if err := sandbox.Probe(ctx); err != nil {
		return result, err
	}
	if err := checkTypes(ctx, r, t); err != nil {
		return result, err
	}
	if err := checkFit(ctx, r, t); err != nil {
		return result, err
	}
	b := &build{r: r, t: t, src: filepath.Join(r.WorkDir, "src"), out: filepath.Join(r.WorkDir, "out")}
	if err := stage(ctx, r.Source, b.src); err != nil {
		return result, diskFull(fmt.Errorf("copy sources: %w", err))
	}
	for _, dir := range []string{b.out, b.modulesDir(), b.debugDir()} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return result, diskFull(err)
		}
	}
	hidden, err := hideVolatileHeaders(r.Headers, filepath.Join(r.WorkDir, "hidden"))
	if err != nil {
		return result, diskFull(err)
	}
	b.box = sandbox.Config{
		Env: environment(t), Dir: insideSource,
		Binds: append([]sandbox.Bind{
			{Host: r.Toolchain, Inside: insideToolchain},
			{Host: r.Headers, Inside: insideKernel},
			{Host: b.src, Inside: insideSource, Writable: true},
			{Host: b.out, Inside: insideOut, Writable: true},
		}, hidden...),
	}
	if err := b.newGuard(); err != nil {
		return result, diskFull(err)
	}
	b.args = append(command(t), "ARCH="+kernelArch[r.Arch])
	b.args = append(append(b.args, t.variables...), flagVariables(r, t)...)
	b.debug = debugInformation(r)
	b.watch = newWatch(r.Log, r.Progress, countWork(b.src), time.Now)

	err = b.make(ctx)
	if cerr := b.watch.close(err != nil); cerr != nil && err == nil {
		err = diskFull(fmt.Errorf("write log: %w", cerr))
	}
	result.Phases = b.watch.phases
	if err != nil {
		return result, diagnose(err, b.watch.findings)
	}
	if r.BTF != "" {
		if err := b.types(ctx, result); err != nil {
			return result, err
		}
	}
	if err = b.strip(ctx, result); err != nil {
		clear(result.Modules)
		clear(result.Debug)
	}
	return result, err
}

func (b *build) modulesDir() string { return filepath.Join(b.r.WorkDir, "modules") }
func (b *build) debugDir() string   { return filepath.Join(b.r.WorkDir, "debug") }

// make runs make, after writing what is stored into the sources. Nothing but
// make gets to see the sources writable, so until then they are as staged.
func (b *build) make(ctx context.Context) error {
	var a *answers
	var o *objects
	restored := 0
	if b.r.Cache != nil {
		v, err := newView(ctx, b.r.Cache, b.r.Headers, b.r.HeaderDigest)
		if err == nil {
			err = b.flagTests(ctx, v)
		}
		if err == nil {
			a, err = b.answers(ctx, v)
		}
		if errors.Is(err, errUseMake) {
			fmt.Fprintf(b.watch, "prebake: %v\n", err)
		} else if err != nil {
			return diskFull(err)
		} else {
			if o, err = b.newObjects(v, a); err == nil {
				restored, err = o.restore(ctx)
			}
			if err != nil {
				return diskFull(fmt.Errorf("restore objects: %w", err))
			}
			b.watch.reuse(phaseCompile, restored)
		}
	}
	box := b.box
	if b.watch.expect.compile-restored >= minForPCH {
		var err error
		if box, err = b.precompile(box); err != nil {
			return diskFull(err)
		}
	}
	err := b.runMake(ctx, box, "trouble")
	if a != nil && err != nil && b.watch.findings.unanswered {
		fmt.Fprintf(b.watch, "prebake: %v: make asks what the plan did not name\n", errUseMake)
		b.watch.findings, o = findings{}, nil
		if err := errors.Join(os.RemoveAll(b.src), stage(ctx, b.r.Source, b.src)); err != nil {
			return diskFull(err)
		}
		err = b.runMake(ctx, b.box, "trouble-again")
	}
	if err != nil || o == nil {
		return err
	}
	left, err := untrusted.Open(b.src)
	if err != nil {
		return err
	}
	defer left.Close()
	if !a.unchanged(left) {
		return nil // make asked again: it knew better, and nothing is sure
	}
	if err := o.store(ctx, left); err != nil {
		return diskFull(fmt.Errorf("keep objects: %w", err))
	}
	return nil
}

// minForPCH is how many files have to be left to compile: a precompiled header costs
// about as much as three of them.
const minForPCH = 16

// runMake runs make with a guard in front of the compiler. What the guard noted
// is the error, whatever make came to: an answer may have been made of it.
func (b *build) runMake(ctx context.Context, box sandbox.Config, note string) error {
	dir := filepath.Join(b.r.WorkDir, note)
	box, err := withFaultFile(box, dir)
	if err != nil {
		return diskFull(err)
	}
	box.Argv, box.Output = append(slices.Clone(b.args), "-j"+strconv.Itoa(b.r.Jobs)), b.watch
	err = sandbox.Run(ctx, box)
	var exit *sandbox.ExitError
	if err == nil || errors.As(err, &exit) {
		return cmp.Or(compilerFault(dir), err)
	}
	return err
}

// flagVariables are compiler flags of ours, on top of the kernel's.
func flagVariables(r Request, t tools) []string {
	var cflags, all []string
	if t.btf {
		all = append(all, "CONFIG_DEBUG_INFO_BTF_MODULES=") // see types
	}
	if t.clang {
		cflags = append(cflags, clangFlags...)
	}
	if !debugInformation(r) {
		cflags, all = append(cflags, "-g0"), append(all, "KAFLAGS=-g0")
	}
	if len(cflags) > 0 {
		all = append(all, "KCFLAGS="+strings.Join(cflags, " "))
	}
	return all
}

// debugInformation reports whether to compile with it. It is a fifth of the
// work and most of the bytes, and goes with stripping, unless BTF is made of it.
func debugInformation(r Request) bool { return r.Debug || r.BTF != "" }

// built are the modules that make left, by file name.
func (b *build) built() ([]string, error) {
	left, err := untrusted.Open(b.src)
	if err != nil {
		return nil, err
	}
	defer left.Close()
	files, err := left.Named(".ko")
	if err != nil {
		return nil, fault.Wrap(fault.Internal, fmt.Errorf("look for modules: %w", err), hintLog)
	}
	if len(files) == 0 {
		return nil, fault.New(fault.Internal, "make succeeded, but left no module", "read the build's log")
	}
	return files, nil
}

// strip makes each module without its debug sections, and takes it out of the
// sandbox's reach.
func (b *build) strip(ctx context.Context, result *Result) (err error) {
	built, err := b.built()
	if err != nil {
		return err
	}
	phase := timeline.Phase{Name: "strip", Start: time.Now().UTC(), Note: count(len(built), "module")}
	defer func() {
		phase.Seconds, phase.Failed = time.Since(phase.Start).Seconds(), err != nil
		result.Phases = append(result.Phases, phase)
	}()
	b.r.Progress("strip", 0, len(built))
	var mu sync.Mutex // the log's, and of what is counted
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(b.r.Jobs)
	for i, name := range built {
		g.Go(func() error {
			module, err := b.stripOne(gctx, name, filepath.Join(b.out, strconv.Itoa(i)), &mu)
			if err != nil {
				return fmt.Errorf("strip %s: %w", name, err)
			}
			mu.Lock()
			defer mu.Unlock()
			base := strings.TrimSuffix(name, ".ko")
			result.Modules[base] = module
			if b.r.Debug {
				result.Debug[base] = filepath.Join(b.debugDir(), name)
			}
			b.r.Progress("strip", len(result.Modules), len(built))
			return nil
		})
	}
	return g.Wait()
}

// stripOne strips one module into a folder that only this run of strip can write
// to, and returns the path of a copy.
func (b *build) stripOne(ctx context.Context, name, out string, mu *sync.Mutex) (module string, err error) {
	if err := os.Mkdir(out, 0o755); err != nil {
		return "", diskFull(err)
	}
	var said bytes.Buffer
	box := b.box
	box.Output, box.MaxOutput = &said, 1<<20
	box.Binds = slices.Clone(b.box.Binds)
	for i := range box.Binds {
		switch box.Binds[i].Inside {
		case insideOut:
			box.Binds[i].Host = out
		case insideSource:
			box.Binds[i].Writable = false
		}
	}
	box.Argv = []string{b.t.strip, "--strip-debug", "-o", insideOut + "/" + name, insideSource + "/" + name}
	err = sandbox.Run(ctx, box)
	mu.Lock()
	w := newWatch(b.r.Log, func(string, int, int) {}, work{}, time.Now)
	_, werr := w.Write(said.Bytes())
	werr = cmp.Or(werr, w.close(err != nil))
	mu.Unlock()
	if err = cmp.Or(err, werr); err != nil {
		return "", diagnose(err, w.findings)
	}
	module = filepath.Join(b.modulesDir(), name)
	if err := take(out, name, module); err != nil {
		return "", err
	}
	debug := ""
	if b.r.Debug {
		debug = filepath.Join(b.debugDir(), name)
		if err := take(b.src, name, debug); err != nil {
			return "", err
		}
	}
	return module, setBuildID(module, debug)
}

// maxModule bounds a module with its debug information: NVIDIA's largest has 400 MB.
const maxModule = 2 << 30

// take copies a module out of a folder that a sandbox could write to.
func take(dir, name, to string) (err error) {
	left, err := untrusted.Open(dir)
	if err != nil {
		return err
	}
	defer left.Close()
	_, err = left.Copy(to, name, maxModule)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, untrusted.ErrKind), errors.Is(err, untrusted.ErrLarge):
		return fault.Wrap(fault.Internal, fmt.Errorf("take %s out of the sandbox: %w", name, err), hintLog)
	}
	return diskFull(err)
}

func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return strconv.Itoa(n) + " " + thing + "s"
}
