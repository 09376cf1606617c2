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
	"time"

	"github.com/prebake/prebake/builder/internal/sandbox"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// Recipe names the way modules are made here. It goes into cache keys: raise the
// number with any change that may change the bytes that come out.
const Recipe = "compile-1"

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
	// WorkDir is an empty folder on a disk with 1 GiB to spare. It holds src/
	// and out/ afterwards and belongs to the caller.
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
	// Phases are conftest, compile, link and strip, as far as each took place.
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

// run stages the sources, compiles with the make command given, and strips.
func run(ctx context.Context, r Request, command func(tools) []string) (result *Result, err error) {
	result = &Result{Modules: map[string]string{}}
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
	src, out := filepath.Join(r.WorkDir, "src"), filepath.Join(r.WorkDir, "out")
	if err := stage(ctx, r.Source, src); err != nil {
		return result, diskFull(fmt.Errorf("copy sources: %w", err))
	}
	if err := os.Mkdir(out, 0o755); err != nil {
		return result, diskFull(err)
	}
	box := sandbox.Config{
		Env: environment(t), Dir: insideSource,
		Binds: []sandbox.Bind{
			{Host: r.Toolchain, Inside: insideToolchain},
			{Host: r.Headers, Inside: insideKernel},
			{Host: src, Inside: insideSource, Writable: true},
			{Host: out, Inside: insideOut, Writable: true},
		},
	}

	w := newWatch(r.Log, r.Progress, countWork(src), time.Now)
	box.Output = w
	box.Argv = append(command(t), "-j"+strconv.Itoa(r.Jobs), "ARCH="+kernelArch[r.Arch])
	box.Argv = append(box.Argv, t.variables...)
	if t.clang {
		// Kernels ask for this error, and older drivers trip over it in clang's
		// stricter reading; COS's own farm drops it too.
		box.Argv = append(box.Argv, "KCFLAGS=-Wno-error=strict-prototypes")
	}
	err = sandbox.Run(ctx, box)
	if cerr := w.close(err != nil); cerr != nil && err == nil {
		err = diskFull(fmt.Errorf("write log: %w", cerr))
	}
	result.Phases = w.phases
	if err != nil {
		return result, diagnose(err, w.findings)
	}

	err = strip(ctx, r, box, t, result)
	if err != nil {
		clear(result.Modules)
	}
	return result, err
}

// strip writes each module without its debug sections into out.
func strip(ctx context.Context, r Request, box sandbox.Config, t tools, result *Result) (err error) {
	built, err := filepath.Glob(filepath.Join(r.WorkDir, "src", "*.ko"))
	if err != nil {
		return err
	}
	slices.Sort(built)
	if len(built) == 0 {
		return fault.New(fault.Internal, "make ended well but left no module", "read the build's log for what it did")
	}
	w := newWatch(r.Log, func(string, int, int) {}, work{}, time.Now)
	box.Output = w
	phase := timeline.Phase{Name: "strip", Start: time.Now().UTC(), Note: count(len(built), "module")}
	defer func() {
		phase.Seconds, phase.Failed = time.Since(phase.Start).Seconds(), err != nil
		result.Phases = append(result.Phases, phase)
	}()
	for i, file := range built {
		r.Progress("strip", i, len(built))
		name := filepath.Base(file)
		box.Argv = []string{t.strip, "--strip-debug", "-o", insideOut + "/" + name, insideSource + "/" + name}
		err := sandbox.Run(ctx, box)
		err = cmp.Or(err, w.close(err != nil))
		if err != nil {
			return diagnose(fmt.Errorf("strip %s: %w", name, err), w.findings)
		}
		path := filepath.Join(r.WorkDir, "out", name)
		if err := os.Chmod(path, 0o644); err != nil {
			return fmt.Errorf("strip %s: %w", name, err)
		}
		result.Modules[strings.TrimSuffix(name, ".ko")] = path
	}
	r.Progress("strip", len(built), len(built))
	return nil
}

func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return strconv.Itoa(n) + " " + thing + "s"
}
