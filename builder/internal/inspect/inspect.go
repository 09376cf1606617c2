// Package inspect examines one COS build in a bucket:
//
//   - which objects exist, and which of them a build reads;
//   - whether the driver bucket has the drivers that COS lists;
//   - what the archives contain;
//   - what the kernel's configuration says;
//   - whether compiler and kernel fit each other and this machine;
//   - whether Google's signatures are by a key that the kernel trusts;
//   - whether a load test can boot the kernel.
//
// After a failure, the inspection continues where it can. For example, if a build could not use the inputs, it reports
// what each archive contains. The package never compiles and never writes to the bucket.
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
	"unicode"

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
	// DriverMirror is the URL of the bucket with NVIDIA's runfiles.
	DriverMirror string
	// Progress receives one line at a time, without characters that a terminal may obey. It may be nil.
	Progress func(string)
}

type inspection struct {
	doctor.Report
	bucket *cosbucket.Bucket
	cache  *cas.Cache
	kernel target.Kernel
}

// maxText is the maximum length of a finding's text, in bytes.
const maxText = 64 << 10

// add adds a finding. Much of a finding's text comes from the bucket, so add replaces characters that could control a
// terminal.
func (l *inspection) add(f doctor.Finding) {
	f.Text, f.Next = printable(f.Text), printable(f.Next)
	l.Findings = append(l.Findings, f)
}

func printable(text string) string {
	if len(text) > maxText {
		text = text[:maxText] + " ..."
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || r == '\n' || r == '\t' {
			return r
		}
		return unicode.ReplacementChar
	}, text)
}

func (l *inspection) ok(check, format string, args ...any) {
	l.add(doctor.Finding{Check: check, Level: doctor.OK, Text: fmt.Sprintf(format, args...)})
}

func (l *inspection) note(check, format string, args ...any) {
	l.add(doctor.Finding{Check: check, Level: doctor.Note, Text: fmt.Sprintf(format, args...)})
}

func (l *inspection) fail(check string, level doctor.Level, err error) {
	next := fault.Hint(err)
	if next == "" {
		next = "report this error as a bug, with the whole output of this command"
	}
	l.add(doctor.Finding{Check: check, Level: level, Text: err.Error(), Next: next, Class: fault.Of(err).String()})
}

// Build examines one COS build and returns the findings. The objects that it fetches stay in the cache.
func Build(ctx context.Context, b *cosbucket.Bucket, cache *cas.Cache, k target.Kernel, c Config) *doctor.Report {
	progress := c.Progress
	c.Progress = func(line string) {
		if progress != nil {
			progress(printable(line)) // it may have names from the archives
		}
	}
	l := &inspection{bucket: b, cache: cache, kernel: k}
	l.objects(ctx)
	own := l.listing(ctx)
	wanted := l.drivers(ctx)
	if err := l.runfiles(ctx, c.DriverMirror, wanted); err != nil {
		l.fail("runfiles", doctor.Warn, err)
	}
	in, err := cossrc.Fetch(ctx, b, cache, k.BuildID, k.Board, c.Progress)
	if err != nil {
		l.fail("inputs", doctor.Fail, err)
		l.contents(ctx, err, c)
	} else {
		l.inputs(ctx, in)
	}
	l.signatures(ctx, own, wanted, c)
	l.loadTest(ctx, in, c)
	return &l.Report
}

// inputs reports the kernel inputs that a build would use.
func (l *inspection) inputs(ctx context.Context, in *cossrc.Inputs) {
	l.ok("inputs", "kernel %s, commit %s; ABI fingerprint %s", in.Kernel.Release, or(in.Kernel.Commit, "unknown"),
		in.Fingerprint.Short())
	for _, m := range in.Materials {
		if m.Unverified {
			l.note("fetched", "%s, %s, not verified, because the bucket has no checksum for it", m.URI, bytes(m.Size))
		} else {
			l.ok("fetched", "%s, %s, with its checksum", m.URI, bytes(m.Size))
		}
	}
	l.ok("headers", "%s", filepath.Base(in.Headers))
	if config, err := kconfig.ReadFile(filepath.Join(in.Headers, ".config")); err != nil {
		l.fail("configuration", doctor.Fail, err)
	} else {
		l.configuration(config)
	}
	var env []string
	for name, value := range in.Env {
		env = append(env, name+"="+value)
	}
	slices.Sort(env)
	l.ok("toolchain", "%s; at the archive's root: %s", strings.Join(env, " "), rootOf(in.Toolchain))
	if err := compile.Check(ctx,
		compile.Request{Headers: in.Headers, Toolchain: in.Toolchain, Env: in.Env, Arch: in.Kernel.Arch,
			Release: in.Kernel.Release}); err != nil {
		l.fail("tools", doctor.Fail, err)
	} else {
		l.ok("tools", "compiler and kernel fit each other and this machine")
	}
}

// rootOf returns the names in a folder as text for people.
func rootOf(dir string) string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err.Error()
	}
	var names []string
	for _, e := range entries {
		name := e.Name()
		if e.IsDir() {
			name += "/"
		}
		names = append(names, name)
	}
	return some(names, maxNames)
}

func or(text, other string) string {
	if text == "" {
		return other
	}
	return text
}

// readObjects returns the names of the objects that a build may read, without those of single drivers. required has the
// names of the objects that every build needs.
func (l *inspection) readObjects() (names []string, required map[string]bool) {
	k := l.kernel
	return []string{cosbucket.HeadersName(k), cosbucket.ToolchainEnvName(k), cosbucket.ToolchainName(k),
			cosbucket.ToolchainPointerName(k), cosbucket.ToolchainPathName(k), cosbucket.ToolchainURLName(k),
			cosbucket.VMLinuxName(k), cosbucket.CommitName(k), cosbucket.KernelInfoName(k), cosbucket.TrustedKeyName(k),
			cosbucket.DriverVersionsName(k), cosbucket.DriverVersionsBinName(k), cosbucket.BootName(k)},
		map[string]bool{cosbucket.HeadersName(k): true, cosbucket.ToolchainEnvName(k): true}
}

// objects reports which objects of the COS build exist, in which layout, and how large they are.
func (l *inspection) objects(ctx context.Context) {
	names, required := l.readObjects()
	for _, name := range names {
		at, size, err := find(ctx, l.bucket, cosbucket.Layouts(l.kernel, name)...)
		switch {
		case err == nil:
			l.ok("object", "%s, %s", at, bytes(size))
		case fault.Is(err, fault.InputMissing) && !required[name]:
			l.note("object", "no %s", path.Base(name))
		default:
			l.fail("object", doctor.Fail, err)
		}
	}
}

// find returns the path and size of the first object that the bucket has. It does not read the object.
func find(ctx context.Context, b *cosbucket.Bucket, names ...string) (at string, size int64, err error) {
	for _, at = range names {
		var r io.ReadCloser
		var attrs cosbucket.Attrs
		if r, attrs, err = b.Get(ctx, at); err == nil {
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

// facts are the kernel's options that decide how modules are compiled, loaded and tested.
var facts = []string{
	"CONFIG_CC_VERSION_TEXT", "CONFIG_LD_IS_LLD", "CONFIG_AS_IS_LLVM", "CONFIG_MODVERSIONS", "CONFIG_MODULE_SIG",
	"CONFIG_MODULE_SIG_FORCE", "CONFIG_MODULE_SIG_HASH",
	"CONFIG_SECURITY_LOADPIN", "CONFIG_DEBUG_INFO_BTF_MODULES", "CONFIG_PVH", "CONFIG_DRM", "CONFIG_IKCONFIG",
	"CONFIG_PREEMPT_RT", "CONFIG_WERROR", "CONFIG_LTO_NONE", "CONFIG_LOCALVERSION",
}

func (l *inspection) configuration(config kconfig.Config) {
	var values []string
	for _, name := range facts {
		values = append(values, strings.TrimPrefix(name, "CONFIG_")+"="+or(config[name], "unset"))
	}
	l.ok("configuration", "%s", strings.Join(values, " "))
}

// loadTest reports whether a load test can boot the kernel of the COS build, and from which object. Without inputs, it
// only reads vmlinux.
func (l *inspection) loadTest(ctx context.Context, in *cossrc.Inputs, c Config) {
	switch {
	case in == nil && !c.VMLinux:
		return
	case in == nil:
	case in.Boot != "":
		l.ok("load test", "boots prebake-boot.tgz")
		return
	case !in.HasVMLinux:
		l.fail("load test", doctor.Warn,
			fault.New(fault.InputMissing,
				"find vmlinux: the bucket has no vmlinux, so builds run static checks and no load test",
				"put the vmlinux of the COS build into the bucket"))
		return
	case !c.VMLinux:
		l.note("load test", "boots vmlinux; to fetch vmlinux and compare it with the headers, add --vmlinux")
		return
	}
	file, _, err := cossrc.FetchVMLinux(ctx, l.bucket, l.cache, l.kernel, c.Progress)
	if err == nil {
		err = l.vmlinux(file, in)
	}
	if err != nil {
		l.fail("load test", doctor.Warn, err)
	}
}

// vmlinux reports the facts that the file vmlinux contains. With inputs, it compares vmlinux with the headers and makes
// a kernel image of it.
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
	if in == nil {
		return nil
	}
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
