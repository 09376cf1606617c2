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

	"github.com/prebake/prebake/builder/internal/sandbox"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// Recipe names the way modules are made here. It goes into cache keys: raise the
// number with any change that may change the bytes that come out.
const Recipe = "compile-2"

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
	// Jobs is make's -j; 0 is the number of CPUs. It does not change the result.
	Jobs int
	// Debug keeps debug information: Result.Debug has the modules before
	// stripping. It does not change the stripped ones.
	Debug bool
	// BTF is a file with the description of the kernel's types; the modules get
	// one of theirs that goes on where it ends. "" is none.
	BTF string
	// Cache remembers what conftest found out and what was compiled, for the
	// same and for sibling kernels; nil does all the work again. It does not
	// change the result. With it HeaderDigest, ToolchainDigest and SourceDigest
	// are needed: they name the content of those folders, the last one for all
	// flavours of Driver. A HeaderDigest may leave out compile.h and utsversion.h.
	Cache                                       *cas.Cache
	HeaderDigest, ToolchainDigest, SourceDigest string
	// WorkDir is an empty folder on a disk with 1 GiB to spare. It holds src/,
	// out/ and, with a Cache, aid/ and preambles/ afterwards and belongs to the caller.
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
	// file in WorkDir/out, mode 0644.
	Modules map[string]string
	// Debug maps them to the files before stripping, with the same build ids.
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
		// conftest.sh wants Module.symvers to name vmlinux's symbols. Kernels
		// without MODVERSIONS, as COS's, may come without that file.
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
	if left, err := os.ReadDir(r.WorkDir); err == nil && len(left) > 0 {
		errs = append(errs, fmt.Errorf("work folder %s: not empty", r.WorkDir))
	}
	if r.Cache != nil && (r.HeaderDigest == "" || r.ToolchainDigest == "" || r.SourceDigest == "") {
		errs = append(errs, errors.New("cache without the digests of headers, toolchain and source"))
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

// build is one compilation under way.
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
	b := &build{r: r, t: t, src: filepath.Join(r.WorkDir, "src"), out: filepath.Join(r.WorkDir, "out")}
	if err := stage(ctx, r.Source, b.src); err != nil {
		return result, diskFull(fmt.Errorf("copy sources: %w", err))
	}
	if err := os.Mkdir(b.out, 0o755); err != nil {
		return result, diskFull(err)
	}
	b.box = sandbox.Config{
		Env: environment(t), Dir: insideSource,
		Binds: []sandbox.Bind{
			{Host: r.Toolchain, Inside: insideToolchain},
			{Host: r.Headers, Inside: insideKernel},
			{Host: b.src, Inside: insideSource, Writable: true},
			{Host: b.out, Inside: insideOut, Writable: true},
		},
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

// make runs make, with what is remembered laid out for it.
func (b *build) make(ctx context.Context) error {
	var a *aid
	if b.r.Cache != nil {
		var err error
		if a, err = b.prepare(ctx); errors.Is(err, errNoAid) {
			fmt.Fprintf(b.watch, "prebake: %v\n", err)
		} else if err != nil {
			return diskFull(err)
		}
	}
	if a != nil {
		n, err := a.restore(ctx)
		if err != nil {
			return diskFull(fmt.Errorf("restore objects: %w", err))
		}
		b.watch.reuse(phaseCompile, n)
		if n == 0 {
			if err := b.preambles(); err != nil {
				return diskFull(err)
			}
		}
	}
	box := b.box
	box.Argv, box.Output = append(slices.Clone(b.args), "-j"+strconv.Itoa(b.r.Jobs)), b.watch
	if err := sandbox.Run(ctx, box); err != nil {
		return err
	}
	if a != nil {
		if err := a.keep(ctx); err != nil {
			return diskFull(fmt.Errorf("keep objects: %w", err))
		}
	}
	return nil
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
	files, err := filepath.Glob(filepath.Join(b.src, "*.ko"))
	if err != nil {
		return nil, err
	}
	slices.Sort(files)
	if len(files) == 0 {
		return nil, fault.New(fault.Internal, "make ended well but left no module", "read the build's log for what it did")
	}
	return files, nil
}

// strip writes each module without its debug sections into out.
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
	for _, file := range built {
		g.Go(func() error {
			name := filepath.Base(file)
			if err := b.stripOne(gctx, name, &mu); err != nil {
				return fmt.Errorf("strip %s: %w", name, err)
			}
			mu.Lock()
			defer mu.Unlock()
			module := strings.TrimSuffix(name, ".ko")
			result.Modules[module] = filepath.Join(b.out, name)
			if b.r.Debug {
				result.Debug[module] = file
			}
			b.r.Progress("strip", len(result.Modules), len(built))
			return nil
		})
	}
	return g.Wait()
}

func (b *build) stripOne(ctx context.Context, name string, mu *sync.Mutex) error {
	var said bytes.Buffer
	box := b.box
	box.Output, box.MaxOutput = &said, 1<<20
	box.Argv = []string{b.t.strip, "--strip-debug", "-o", insideOut + "/" + name, insideSource + "/" + name}
	err := sandbox.Run(ctx, box)
	mu.Lock()
	w := newWatch(b.r.Log, func(string, int, int) {}, work{}, time.Now)
	_, werr := w.Write(said.Bytes())
	werr = cmp.Or(werr, w.close(err != nil))
	mu.Unlock()
	if err = cmp.Or(err, werr); err != nil {
		return diagnose(err, w.findings)
	}
	path, debug := filepath.Join(b.out, name), ""
	if b.r.Debug {
		debug = filepath.Join(b.src, name)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		return err
	}
	return setBuildID(path, debug)
}

func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return strconv.Itoa(n) + " " + thing + "s"
}
