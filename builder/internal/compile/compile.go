// Package compile turns module sources into .ko files with kbuild, the kernel's own build system. It compiles in a
// sandbox with the same paths, environment, user and host name on every machine. So equal inputs give equal bytes. The
// package never downloads anything, and never compiles outside the sandbox. It does not decide whether a module fits
// the kernel; package modcheck does.
//
// Inside the sandbox, /prebake/kernel is the header tree and /prebake/toolchain the toolchain, both read-only.
// /prebake/src is a copy of the sources. Results go to /prebake/out.
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

// Recipe is the version of this package's code, and a part of cache keys. Raise it with any change that may give a
// module other bytes. A change that only lets drivers compile that failed before needs no other version.
const Recipe = "compile-3"

// Request describes one compilation. Source, Headers, Toolchain, Release, Arch and WorkDir are required.
type Request struct {
	// Source is the folder of module sources, which the build copies. For [Modules] it is NVIDIA's kernel/ or
	// kernel-open/. For [External] it is a folder with a Kbuild file.
	Source string
	// Headers is the root of the kernel's header tree. Toolchain is the root of the unpacked toolchain archive.
	Headers, Toolchain string
	// Env is the content of COS's file toolchain_env. It sets CC and CXX and may set LD, AR, NM, OBJCOPY, OBJDUMP and
	// STRIP, each to a program's file name. If CC is missing, the build uses the toolchain's gcc or, if the kernel's
	// configuration says CONFIG_CC_IS_CLANG, the toolchain's clang.
	Env map[string]string
	// Release is the kernel release, as `uname -r` prints it.
	Release string
	// Driver is the driver in Source. [Modules] needs it; [External] does not.
	Driver target.Driver
	Arch   target.Arch
	// Jobs is the number of jobs that `make` runs at once (-j); 0 means the number of CPUs. It does not change the
	// bytes of the modules.
	Jobs int
	// Debug asks for the unstripped modules, with debug information, in Result.Debug. It does not change the stripped
	// modules.
	Debug bool
	// BTF is the path of a file with the kernel's BTF, the description of its types. Each module gets BTF that extends the
	// kernel's. "" means modules without BTF.
	BTF string
	// Cache stores the results of conftest.sh's tests, and compiled objects. If Cache is nil, the build reuses nothing.
	// Cache does not change the bytes of the modules.
	//
	// A request with a Cache needs all four digests. HeaderDigest covers the content of Headers, except compile.h and
	// utsversion.h, whose values the sandbox hides. ToolchainDigest covers the content of Toolchain. SourceDigest covers
	// the driver's sources in all flavours. HostDigest covers the host's programs, see [sandbox.HostTools].
	Cache                                                   *cas.Cache
	HeaderDigest, ToolchainDigest, SourceDigest, HostDigest string
	// WorkDir is an empty folder on a disk with at least 1 GiB free. The caller removes it after the build.
	WorkDir string
	// Log receives the whole output of the build; nil discards it.
	Log io.Writer
	// Progress is called while a phase runs. done and total are numbers of steps; total is 0 if it is unknown. Calls never
	// overlap. Progress may be nil.
	Progress func(phase string, done, total int)
}

// Result is the outcome of a compilation.
type Result struct {
	// Modules has the path of each stripped module, by the module's file name without .ko. The files have mode 0644. No
	// program in a sandbox could write to them.
	Modules map[string]string
	// Debug has the path of each unstripped module, by the same names. An unstripped module has the build id of the
	// stripped one. If Request.Debug is false, the map is empty.
	Debug map[string]string
	// Phases are conftest, compile, link, types and strip. A phase that did not run is missing.
	Phases []timeline.Phase
}

// Modules compiles NVIDIA's kernel modules. After an error, the result has the phases that ran, but no modules. If the
// driver does not compile against the kernel's interfaces, the error is fault.APIBreak with the compiler's first error.
func Modules(ctx context.Context, r Request) (*Result, error) {
	result, err := run(ctx, r, func(t tools) []string {
		args := []string{"make", "modules", "SYSSRC=" + insideKernel, "SYSOUT=" + insideKernel,
			"KERNEL_UNAME=" + r.Release, "IGNORE_CC_MISMATCH=1"}
		// Google's installer sets this variable for kernels without MODVERSIONS, such as COS's kernels. Their Module.symvers
		// has no checksums.
		if !t.modVersions {
			args = append(args, "IGNORE_MISSING_MODULE_SYMVERS=1")
		}
		return args
	})
	if err != nil {
		err = fmt.Errorf("compile %s for kernel release %s: %w", r.Driver, r.Release, err)
	}
	return result, err
}

// External compiles an out-of-tree module that is not NVIDIA's. The module must have a Kbuild file.
func External(ctx context.Context, r Request) (*Result, error) {
	result, err := run(ctx, r, func(tools) []string {
		return []string{"make", "-C", insideKernel, "M=" + insideSource, "modules"}
	})
	if err != nil {
		err = fmt.Errorf("compile %s for kernel release %s: %w", filepath.Base(r.Source), r.Release, err)
	}
	return result, err
}

var releasePattern = regexp.MustCompile(`^[0-9][A-Za-z0-9._+~-]{0,63}$`)

func (r Request) withDefaults() (Request, error) {
	var errs []error
	if r.BTF != "" {
		if info, err := os.Stat(r.BTF); err != nil {
			errs = append(errs, fmt.Errorf("find the BTF file: %w", err))
		} else if !info.Mode().IsRegular() {
			errs = append(errs, fmt.Errorf("BTF file %s is not a regular file", r.BTF))
		}
	}
	for _, dir := range []struct {
		name string
		path *string
	}{{"source", &r.Source}, {"headers", &r.Headers}, {"toolchain", &r.Toolchain}, {"work", &r.WorkDir}} {
		if info, err := os.Stat(*dir.path); err != nil {
			errs = append(errs, fmt.Errorf("find the %s folder: %w", dir.name, err))
		} else if !info.IsDir() {
			errs = append(errs, fmt.Errorf("%s folder %s is not a folder", dir.name, *dir.path))
		}
		abs, err := filepath.Abs(*dir.path)
		if err != nil {
			errs = append(errs, err)
		}
		*dir.path = abs
	}
	if !releasePattern.MatchString(r.Release) {
		errs = append(errs, fmt.Errorf("kernel release %q: want a text as \"uname -r\" prints it", r.Release))
	}
	if _, ok := kernelArch[r.Arch]; !ok {
		errs = append(errs, fmt.Errorf("architecture %q: want amd64 or arm64", r.Arch))
	}
	if r.Jobs < 0 {
		errs = append(errs, fmt.Errorf("number of jobs %d: want 0 or more", r.Jobs))
	}
	if left, err := fs.ReadDir(hostFS(r.WorkDir), "."); err == nil && len(left) > 0 {
		errs = append(errs, fmt.Errorf("work folder %s is not empty", r.WorkDir))
	}
	if r.Cache != nil && (r.HeaderDigest == "" || r.ToolchainDigest == "" || r.SourceDigest == "" || r.HostDigest == "") {
		errs = append(errs, errors.New("the object cache needs the digests of headers, toolchain, source and host tools"))
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
	box      sandbox.Config // `make`'s sandbox, without arguments and output
	args     []string       // `make`'s command line without -j
	debug    bool           // compile with debug information
	watch    *watch
}

// run stages the sources, compiles them with the given make command, and strips the modules.
func run(ctx context.Context, r Request, command func(tools) []string) (result *Result, err error) {
	result = &Result{Modules: map[string]string{}, Debug: map[string]string{}}
	defer func() { err = contextFault(ctx, err) }()
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
		return result, diskFull(fmt.Errorf("copy the driver's sources into the work folder: %w", err))
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

	err = b.compileSources(ctx)
	if cerr := b.watch.close(err != nil); cerr != nil && err == nil {
		err = diskFull(fmt.Errorf("write the log of the compile: %w", cerr))
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

// compileSources puts stored test results and objects into the staged sources, runs `make`, and stores the new objects.
// Until `make` runs, no sandbox can write to the staged sources.
func (b *build) compileSources(ctx context.Context) error {
	var a *answerer
	var o *objects
	restored := 0
	if b.r.Cache != nil {
		v, err := newView(ctx, b.r.Cache, b.r.Headers, b.r.HeaderDigest)
		if err == nil {
			err = b.flagTests(ctx, v)
		}
		if err == nil {
			a, err = b.answerQuestions(ctx, v)
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
				return diskFull(fmt.Errorf("restore compiled objects from the cache: %w", err))
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
		fmt.Fprintf(b.watch, "prebake: %v: make runs a test that is not in make's list of conftest.sh's tests\n", errUseMake)
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
		return nil // `make` changed the results of conftest's tests, so the objects' keys may be wrong
	}
	if err := o.store(ctx, left); err != nil {
		return diskFull(fmt.Errorf("store compiled objects in the cache: %w", err))
	}
	return nil
}

// With fewer files to compile than minForPCH, precompiled headers (PCH) are not worth it. Making one precompiled header
// takes about as long as compiling three files.
const minForPCH = 16

// runMake runs `make` with the guard script in front of the compiler. If the guard recorded a fault of the compiler,
// runMake returns the fault even if `make` succeeded. A test of conftest.sh may have taken the fault for a fact about
// the kernel.
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

// flagVariables returns make variables that add this package's compiler flags to the kernel's flags. If the kernel has
// BTF for modules, the variables also switch off kbuild's BTF step.
func flagVariables(r Request, t tools) []string {
	var cflags, all []string
	if t.btf {
		all = append(all, "CONFIG_DEBUG_INFO_BTF_MODULES=") // kbuild makes no BTF; build.types does it after `make`
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

// debugInformation reports whether to compile with debug information, which takes a fifth of the compile time.
func debugInformation(r Request) bool { return r.Debug || r.BTF != "" }

// moduleFiles returns the file names of the modules that `make` left in the staged sources.
func (b *build) moduleFiles() ([]string, error) {
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
		return nil, fault.New(fault.Internal, "look for modules: make ended without an error, but made no module",
			"read the build's log")
	}
	return files, nil
}

// strip writes each module without its debug sections to the modules folder, which no sandbox can write to.
func (b *build) strip(ctx context.Context, result *Result) (err error) {
	built, err := b.moduleFiles()
	if err != nil {
		return err
	}
	phase := timeline.Phase{Name: "strip", Start: time.Now().UTC(), Note: count(len(built), "module")}
	defer func() {
		phase.Seconds, phase.Failed = time.Since(phase.Start).Seconds(), err != nil
		result.Phases = append(result.Phases, phase)
	}()
	b.r.Progress("strip", 0, len(built))
	var mu sync.Mutex // guards the log and the counts
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

// stripOne strips one module in a sandbox and returns the path of a copy outside any sandbox. Only this call's sandbox
// can write to the given output folder.
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

// maxModule is the maximum size in bytes of a module with debug information. NVIDIA's largest module has 400 MB.
const maxModule = 2 << 30

// take copies a module out of a folder that a sandbox could write to. It refuses anything but a regular file.
func take(dir, name, to string) (err error) {
	left, err := untrusted.Open(dir)
	if err != nil {
		return err
	}
	defer left.Close()
	_, err = left.Copy(to, name, maxModule)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, untrusted.ErrKind), errors.Is(err, untrusted.ErrLarge):
		return fault.Wrap(fault.Internal, fmt.Errorf("copy %s out of the sandbox: %w", name, err), hintLog)
	}
	return diskFull(err)
}

func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return strconv.Itoa(n) + " " + thing + "s"
}
