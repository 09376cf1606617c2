// Package inspect examines one COS build in a bucket:
//
//   - which objects exist;
//   - what the kernel's configuration says;
//   - whether compiler and kernel fit each other and this machine;
//   - whether a load test can boot the kernel.
//
// After a failure it continues where it can. The package never compiles and never writes to the bucket.
package inspect

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prebake/prebake/builder/internal/bootimage"
	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/doctor"
	"github.com/prebake/prebake/builder/internal/kconfig"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Config says what to examine.
type Config struct {
	// VMLinux makes Build fetch vmlinux, the linked kernel, and compare it with the headers. vmlinux may have hundreds of
	// megabytes.
	VMLinux bool
	// Progress receives one line at a time. It may be nil.
	Progress func(string)
}

type inspection struct {
	doctor.Report
	bucket *cosbucket.Bucket
	cache  *cas.Cache
	kernel target.Kernel
}

func (l *inspection) ok(check, format string, args ...any) {
	l.Findings = append(l.Findings, doctor.Finding{Check: check, Level: doctor.OK, Text: fmt.Sprintf(format, args...)})
}

func (l *inspection) note(check, format string, args ...any) {
	l.Findings = append(l.Findings, doctor.Finding{Check: check, Level: doctor.Note, Text: fmt.Sprintf(format, args...)})
}

func (l *inspection) fail(check string, level doctor.Level, err error) {
	next := fault.Hint(err)
	if next == "" {
		next = "report this error as a bug, with the whole output of this command"
	}
	l.Findings = append(l.Findings,
		doctor.Finding{Check: check, Level: level, Text: err.Error(), Next: next, Class: fault.Of(err).String()})
}

// Build examines one COS build and returns the findings. The objects that it fetches stay in the cache.
func Build(ctx context.Context, b *cosbucket.Bucket, cache *cas.Cache, k target.Kernel, c Config) *doctor.Report {
	if c.Progress == nil {
		c.Progress = func(string) {}
	}
	l := &inspection{bucket: b, cache: cache, kernel: k}
	l.objects(ctx)
	l.drivers(ctx)
	l.googleDrivers(ctx)
	in, err := cossrc.Fetch(ctx, b, cache, k.BuildID, k.Board, c.Progress)
	if err != nil {
		l.fail("inputs", doctor.Fail, err)
		return &l.Report
	}
	l.ok("inputs", "kernel %s, commit %s; ABI fingerprint %s", in.Kernel.Release, or(in.Kernel.Commit, "unknown"),
		in.Fingerprint.Short())
	l.ok("headers", "%s", filepath.Base(in.Headers))
	l.configuration(in.Headers)
	var env []string
	for name, value := range in.Env {
		env = append(env, name+"="+value)
	}
	slices.Sort(env)
	l.ok("toolchain", "%s", strings.Join(env, " "))
	if err := compile.Check(ctx,
		compile.Request{Headers: in.Headers, Toolchain: in.Toolchain, Env: in.Env, Arch: in.Kernel.Arch,
			Release: in.Kernel.Release}); err != nil {
		l.fail("tools", doctor.Fail, err)
	} else {
		l.ok("tools", "compiler and kernel fit each other and this machine")
	}
	l.loadTest(ctx, in, c)
	return &l.Report
}

func or(text, other string) string {
	if text == "" {
		return other
	}
	return text
}

// objects reports which objects of the COS build exist, in which layout, and how large they are.
func (l *inspection) objects(ctx context.Context) {
	for _, o := range []struct {
		name   string
		needed bool
	}{
		{cosbucket.HeadersName(l.kernel), true}, {cosbucket.ToolchainEnvName(l.kernel), true},
		{cosbucket.ToolchainName(l.kernel), false},
		{cosbucket.ToolchainPointerName(l.kernel), false}, {cosbucket.ToolchainPathName(l.kernel), false},
		{cosbucket.ToolchainURLName(l.kernel), false},
		{cosbucket.VMLinuxName(l.kernel), false}, {cosbucket.CommitName(l.kernel), false},
		{cosbucket.KernelInfoName(l.kernel), false},
		{cosbucket.TrustedKeyName(l.kernel), false}, {cosbucket.DriverVersionsName(l.kernel), false},
		{cosbucket.DriverVersionsBinName(l.kernel), false},
		{cosbucket.BootName(l.kernel), false},
	} {
		at, size, err := l.find(ctx, o.name)
		switch {
		case err == nil:
			l.ok("object", "%s, %s", at, bytes(size))
		case fault.Is(err, fault.InputMissing) && !o.needed:
			l.note("object", "no %s", path.Base(o.name))
		default:
			l.fail("object", doctor.Fail, err)
		}
	}
}

// find returns the path and size of an object in the first layout that has it. It does not read the object.
func (l *inspection) find(ctx context.Context, name string) (at string, size int64, err error) {
	for _, at = range cosbucket.Layouts(l.kernel, name) {
		var r io.ReadCloser
		var attrs cosbucket.Attrs
		if r, attrs, err = l.bucket.Get(ctx, at); err == nil {
			return at, attrs.Size, r.Close()
		}
		if !fault.Is(err, fault.InputMissing) {
			break
		}
	}
	return "", 0, err
}

func bytes(n int64) string {
	if n < 0 {
		return "size unknown"
	}
	if n < 1e6 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}

func (l *inspection) drivers(ctx context.Context) {
	list, err := l.bucket.Drivers(ctx, l.kernel)
	if err != nil {
		l.fail("drivers", doctor.Warn, err)
		return
	}
	l.ok("drivers", "default version %s, latest version %s; all versions: %s", or(list.Default, "none"),
		or(list.Latest, "none"), strings.Join(list.Versions, " "))
	var gpus []string
	for gpu, own := range list.GPUs {
		gpus = append(gpus, fmt.Sprintf("%s (default %s)", gpu, or(own.Default, "none")))
	}
	if slices.Sort(gpus); len(gpus) > 0 {
		l.ok("GPU types", "%s", strings.Join(gpus, ", "))
	}
}

// googleDrivers reports which drivers Google compiled or signed for the COS build.
func (l *inspection) googleDrivers(ctx context.Context) {
	var found []string
	for _, name := range []string{"extensions/gpu/", "nvidia-drivers-"} {
		for _, prefix := range cosbucket.Layouts(l.kernel, l.kernel.BuildID+"/"+l.kernel.Board+"/"+name) {
			names, err := l.bucket.List(ctx, prefix)
			if fault.Is(err, fault.Unsupported) {
				l.note("signed", "it is unknown which drivers Google signed, because the bucket cannot be listed: %v", err)
				return
			}
			if err != nil {
				l.fail("signed", doctor.Warn, err)
				return
			}
			found = append(found, names...)
		}
	}
	if len(found) == 0 {
		l.note("signed", "Google compiled or signed no driver for this COS build")
		return
	}
	l.ok("signed", "%s", strings.Join(found, ", "))
}

// facts are the kernel's options that decide how modules are compiled, loaded and tested.
var facts = []string{
	"CONFIG_CC_VERSION_TEXT", "CONFIG_LD_IS_LLD", "CONFIG_AS_IS_LLVM", "CONFIG_MODVERSIONS", "CONFIG_MODULE_SIG",
	"CONFIG_MODULE_SIG_FORCE", "CONFIG_MODULE_SIG_HASH",
	"CONFIG_SECURITY_LOADPIN", "CONFIG_DEBUG_INFO_BTF_MODULES", "CONFIG_PVH", "CONFIG_DRM", "CONFIG_IKCONFIG",
	"CONFIG_PREEMPT_RT", "CONFIG_WERROR", "CONFIG_LTO_NONE", "CONFIG_LOCALVERSION",
}

func (l *inspection) configuration(headers string) {
	set, err := kconfig.ReadFile(filepath.Join(headers, ".config"))
	if err != nil {
		l.fail("configuration", doctor.Fail, err)
		return
	}
	var said []string
	for _, name := range facts {
		said = append(said, strings.TrimPrefix(name, "CONFIG_")+"="+or(set[name], "unset"))
	}
	l.ok("configuration", "%s", strings.Join(said, " "))
}

// loadTest reports whether a load test can boot the kernel of the COS build, and from which object.
func (l *inspection) loadTest(ctx context.Context, in *cossrc.Inputs, c Config) {
	switch {
	case in.Boot != "":
		l.ok("load test", "boots prebake-boot.tgz")
		return
	case !in.HasVMLinux:
		l.fail("load test", doctor.Warn,
			fault.New(fault.InputMissing, "find vmlinux: the bucket has none, so builds run static checks and no load test",
				"put the vmlinux of the COS build into the bucket"))
		return
	case !c.VMLinux:
		l.note("load test", "boots vmlinux; to fetch vmlinux and compare it with the headers, add --vmlinux")
		return
	}
	file, _, err := cossrc.FetchVMLinux(ctx, l.bucket, l.cache, in.Kernel, c.Progress)
	if err == nil {
		err = l.vmlinux(file, in)
	}
	if err != nil {
		l.fail("load test", doctor.Warn, err)
	}
}

func (l *inspection) vmlinux(file string, in *cossrc.Inputs) (err error) {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	found, err := bootimage.ReadFacts(f)
	if err != nil {
		return err
	}
	l.ok("vmlinux", "%s; build id %s; configuration inside: %t", found.Banners[len(found.Banners)-1],
		or(found.BuildID, "none"), found.Config != nil)
	if err := found.Check(in.Headers); err != nil {
		return err
	}
	dir, cleanup, err := l.cache.TempDir("inspect-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cleanup()) }()
	out, err := os.Create(filepath.Join(dir, "image"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if err := bootimage.Write(out, f, in.Kernel.Arch); err != nil {
		return err
	}
	info, err := out.Stat()
	if err != nil {
		return err
	}
	l.ok("load test", "boots vmlinux, of which %s are loaded", bytes(info.Size()))
	return nil
}
