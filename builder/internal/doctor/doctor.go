// Package doctor checks whether a machine has everything that a build needs, and says what to do about each problem. It
// changes nothing, except that it creates an empty cache folder.
//
// The package never guesses: it tries each thing, with the same code as a build.
package doctor

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/builder/internal/loadtest"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/target"
)

// Level is the effect of a finding on builds.
type Level string

// The levels, from good to bad.
const (
	OK   Level = "ok"
	Note Level = "note" // useful to know
	Warn Level = "warn" // some builds fail, or builds work less well
	Fail Level = "fail" // builds do not work
)

// Finding is the result of one check.
type Finding struct {
	Check string `json:"check"`
	Level Level  `json:"level"`
	Text  string `json:"text"`
	// Next says what the operator must do. It is set for every warning and failure.
	Next string `json:"next,omitempty"`
	// Class is the fault class of a failure.
	Class string `json:"class,omitempty"`
	// Packages are the Debian packages that are missing.
	Packages []string `json:"packages,omitempty"`
}

// Report has all findings, in the order of the checks.
type Report struct {
	Findings []Finding `json:"findings"`
	// Install is one command that installs all missing packages on Debian, or "" if none is missing.
	Install string `json:"install,omitempty"`
}

// Config describes the builds that the machine is intended for.
type Config struct {
	// Cache is the cache folder of the builds.
	Cache string
	// Need is the number of bytes that a build needs on the cache's disk. Jobs is the number of compilers that run at
	// once; 0 means one for each processor.
	Need int64
	Jobs int
	// BTF is true if the modules will get BTF.
	BTF bool
	// GuestInit and NVMLProbe are paths of the load test's programs.
	GuestInit, NVMLProbe string
	// Mirrors are the URLs of buckets with kernels and drivers. Destinations are where builds publish. Key is the
	// reference of the signing key. Run checks those of them that are set.
	Mirrors      []string
	Destinations []string
	Key          string
}

// Machine has the functions and facts that the checks use. [Real] returns those of this machine.
type Machine struct {
	// Program reports whether the sandbox will find a program.
	Program func(name string) bool
	// Library reports whether the loader will find a shared library.
	Library func(name string) bool
	// Executable returns an error if a path is not a program that this user may run.
	Executable func(path string) error
	// Sandbox starts a sandbox that does nothing, and returns an error if the sandbox does not work. Limits returns
	// what [sandbox.SupportedLimits] returns on this machine.
	Sandbox func(ctx context.Context) error
	Limits  func() sandbox.LimitSupport
	// Memory is the number of bytes that this process may use. Processors is the number of processors that it may use.
	Memory     int64
	Processors int
	// Cache opens a cache and returns the number of free bytes on its disk.
	Cache func(dir string) (free int64, err error)
	// KVM is true if virtual machines can use the processor's virtualisation.
	KVM bool
	// Now returns the machine's time. Synchronised is true if the kernel considers its clock synchronised.
	Now          func() time.Time
	Synchronised bool
	// Mirror, Destination and Key each check one entry of the Config field with a similar name.
	Mirror, Destination, Key func(ctx context.Context, name string) error
	// MayGo returns a [fault.PublishRefused] error if artifacts of a flavour may not go to a destination.
	MayGo func(ctx context.Context, name string, f target.Flavour) error
}

// networkTimeout is the time limit of one check that uses the network.
const networkTimeout = 20 * time.Second

type examination struct {
	Config
	m Machine
	r *Report
}

// Run does all checks and returns their findings.
func Run(ctx context.Context, c Config, m Machine) *Report {
	e := &examination{Config: c, m: m, r: &Report{Findings: []Finding{}}}
	e.sandbox(ctx)
	e.tools()
	if e.BTF {
		e.types()
	}
	e.limits()
	e.machine()
	e.cache()
	e.loadTest()
	e.clock()
	e.checkConfigured(ctx)
	var packages []string
	for _, f := range e.r.Findings {
		packages = append(packages, f.Packages...)
	}
	slices.Sort(packages)
	if packages = slices.Compact(packages); len(packages) > 0 {
		e.r.Install = "apt-get install " + strings.Join(packages, " ")
	}
	return e.r
}

func (e *examination) add(f Finding) { e.r.Findings = append(e.r.Findings, f) }

func (e *examination) ok(check, format string, args ...any) {
	e.add(Finding{Check: check, Level: OK, Text: fmt.Sprintf(format, args...)})
}

// fail adds a finding for an error. The finding has the error's hint or, if the error has none, the given remedy.
func (e *examination) fail(check string, err error, next string) {
	if hint := fault.Hint(err); hint != "" {
		next = hint
	}
	e.add(Finding{Check: check, Level: Fail, Text: err.Error(), Next: next, Class: fault.Of(err).String()})
}

func missingPackages(check string, level Level, text string, packages ...string) Finding {
	f := Finding{Check: check, Level: level, Text: text, Packages: packages,
		Next: "on Debian: apt-get install " + strings.Join(packages,
			" ") + "; on other systems install the packages that have the missing files"}
	if level == Fail {
		f.Class = fault.Usage.String()
	}
	return f
}

func (e *examination) sandbox(ctx context.Context) {
	if !e.m.Program("bwrap") {
		e.add(missingPackages("sandbox", Fail, "bubblewrap is missing: nothing can be compiled without it", "bubblewrap"))
		return
	}
	if err := e.m.Sandbox(ctx); err != nil {
		e.fail("sandbox", err, "to see the cause, run: bwrap --unshare-all --ro-bind / / true")
		return
	}
	e.ok("sandbox", "bubblewrap runs, and the kernel gives it namespaces")
}

// programs returns the programs that the makefiles of kernel and driver run, grouped by Debian package.
func programs() []struct {
	name string
	of   []string
} {
	return []struct {
		name string
		of   []string
	}{
		{"bc", []string{"bc"}},
		{"coreutils", []string{"basename", "cat", "chmod", "cp", "cut", "date", "dirname", "echo", "env", "expr", "head",
			"ln", "ls", "md5sum", "mkdir", "mktemp", "mv", "readlink", "rm", "sort", "tail", "test", "touch", "tr", "true",
			"uname", "uniq", "wc"}},
		{"dash", []string{"sh"}},
		{"findutils", []string{"find", "xargs"}},
		{"grep", []string{"grep"}},
		{"make", []string{"make"}},
		{"mawk", []string{"awk"}},
		{"sed", []string{"sed"}},
		{"util-linux", []string{"prlimit"}},
	}
}

func (e *examination) tools() {
	var lacks, packages []string
	for _, p := range programs() {
		for _, name := range p.of {
			if !e.m.Program(name) {
				lacks = append(lacks, name)
				packages = append(packages, p.name)
			}
		}
	}
	if !e.m.Library("libelf.so.1") {
		lacks, packages = append(lacks, "libelf.so.1 (for the kernel's objtool)"), append(packages, "libelf1")
	}
	if len(lacks) > 0 {
		packages = slices.Compact(packages)
		text := strings.Join(lacks, ", ")
		e.add(missingPackages("build tools", Fail, "not found in the system folders, such as /usr/bin: "+text, packages...))
		return
	}
	e.ok("build tools", "make, bc, libelf and the shell's tools are installed")
}

func (e *examination) types() {
	if !e.m.Program("pahole") {
		e.add(missingPackages("types", Fail, "pahole is missing: no BTF can be made", "dwarves"))
		return
	}
	e.ok("types", "pahole is installed, which makes BTF")
}

func (e *examination) limits() {
	if b := e.m.Limits(); !b.ControlGroup {
		e.add(Finding{Check: "limits", Level: Warn, Next: fault.Hint(b.Reason),
			Text: fmt.Sprintf("builds get no control group (%v), so the kernel limits only the memory of each single process, "+
				"and a build that runs as root may start any number of processes", b.Reason)})
		return
	}
	e.ok("limits", "each build gets a control group, which limits its memory and its number of processes")
}

func (e *examination) machine() {
	jobs := e.Jobs
	if jobs <= 0 {
		jobs = e.m.Processors
	}
	need := int64(jobs) << 30
	if e.m.Memory < need {
		f := Finding{Check: "memory", Level: Warn,
			Text: fmt.Sprintf("there are %s for %d jobs; want 1 GiB for each job", size(e.m.Memory), jobs),
			Next: fmt.Sprintf("run fewer jobs: --jobs %d", max(1, e.m.Memory>>30))}
		if e.m.Memory < 1<<30 {
			f.Level, f.Class, f.Next = Fail, fault.OutOfMemory.String(), "give the builder at least 1 GiB of memory"
		}
		e.add(f)
		return
	}
	e.ok("memory", "%s, %d processors", size(e.m.Memory), e.m.Processors)
}

func (e *examination) cache() {
	free, err := e.m.Cache(e.Cache)
	switch {
	case err != nil:
		e.fail("cache", err, "give --cache a folder that this user may write")
	case free < e.Need:
		e.add(Finding{Check: "cache", Level: Fail, Class: fault.DiskFull.String(),
			Text: fmt.Sprintf("the disk of %s has %s free; a build needs %s", e.Cache, size(free), size(e.Need)),
			Next: "free space on this disk, or name a folder on another disk with --cache"})
	case free < 5*e.Need:
		e.add(Finding{Check: "cache", Level: Warn,
			Text: fmt.Sprintf("the disk of %s has %s free: enough for a few builds", e.Cache, size(free)),
			Next: "build with --cache-size SIZE, so that the builder deletes old entries of the cache"})
	default:
		e.ok("cache", "%s is writable, %s free", e.Cache, size(free))
	}
}

func (e *examination) loadTest() {
	for _, emulator := range []struct {
		arch          target.Arch
		program, name string
	}{
		{target.AMD64, "qemu-system-x86_64", "qemu-system-x86"}, {target.ARM64, "qemu-system-aarch64", "qemu-system-arm"},
	} {
		check := "qemu " + string(emulator.arch)
		if !e.m.Program(emulator.program) {
			f := missingPackages(check, Warn,
				fmt.Sprintf("%s is missing: drivers for %s cannot be load-tested", emulator.program, emulator.arch), emulator.name)
			f.Next += "; or build with --load-test off"
			e.add(f)
			continue
		}
		if emulator.arch == target.ARM64 && !e.armHelpers(check) {
			continue
		}
		e.ok(check, "%s is installed", emulator.program)
	}
	text := "no KVM here; load tests run in emulation in any case"
	if e.m.KVM {
		text = "KVM is available; load tests run in emulation anyway, so that every machine gives the same verdict"
	}
	e.add(Finding{Check: "kvm", Level: Note, Text: text})
	for _, p := range []struct{ check, path, flag string }{{"guestinit", e.GuestInit, "--guestinit"},
		{"nvmlprobe", e.NVMLProbe, "--probe"}} {
		if err := e.m.Executable(p.path); err != nil {
			e.add(Finding{Check: p.check, Level: Warn, Text: fmt.Sprintf("load tests need this program: %v", err),
				Next: fmt.Sprintf("put %[1]s into the folder of the command builder (to compile %[1]s: make build), or give the "+
					"path of %[1]s with %[2]s; or build with --load-test off", filepath.Base(p.path), p.flag)})
			continue
		}
		e.ok(p.check, "%s", p.path)
	}
}

// earliestDate is before the release of this program. A clock that shows an earlier date is wrong.
func earliestDate() time.Time { return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC) }

// armHelpers looks for the programs that only load tests of arm64 drivers need. If one is missing, armHelpers adds a
// finding and returns false.
func (e *examination) armHelpers(check string) bool {
	for _, p := range []struct{ path, without string }{
		{e.GuestInit, "drivers for arm64 cannot be load-tested"},
		{e.NVMLProbe, "load tests of drivers for arm64 do not ask NVML"},
	} {
		path := loadtest.Helper(p.path, target.ARM64)
		if err := e.m.Executable(path); err != nil {
			e.add(Finding{Check: check, Level: Warn, Text: fmt.Sprintf("the emulator is installed, but %s: %v", p.without, err),
				Next: fmt.Sprintf("put %[1]s beside %[2]s (to compile %[1]s: make arm64-programs), or use the image "+
					"builder-arm64; or build no drivers for arm64", filepath.Base(path), filepath.Base(p.path))})
			return false
		}
	}
	return true
}

func (e *examination) clock() {
	const next = "set the clock, and install a time service, on Debian with: apt-get install systemd-timesyncd"
	switch now := e.m.Now().UTC(); {
	case now.Before(earliestDate()) || now.After(earliestDate().AddDate(30, 0, 0)):
		e.add(Finding{Check: "clock", Level: Fail, Class: fault.Usage.String(), Next: next,
			Text: fmt.Sprintf("the clock shows %s: certificates will not verify, and provenance would have a wrong time",
				now.Format(time.DateTime))})
	case !e.m.Synchronised:
		e.add(Finding{Check: "clock", Level: Note,
			Text: now.Format(time.DateTime) + " UTC; the kernel does not know of a time service that sets the clock"})
	default:
		e.ok("clock", "%s UTC, synchronised", now.Format(time.DateTime))
	}
}

// checkConfigured tries each mirror, destination and key in the configuration. Each trial has a time limit.
func (e *examination) checkConfigured(ctx context.Context) {
	try := func(check, name, good, next string, do func(context.Context, string) error) {
		ctx, cancel := context.WithTimeout(ctx, networkTimeout)
		defer cancel()
		if err := do(ctx, name); err != nil {
			e.fail(check, err, next)
			return
		}
		e.ok(check, "%s %s", name, good)
	}
	for _, name := range e.Mirrors {
		try("mirror", name, "answers", "check the URL of the mirror, the network and the proxy settings", e.m.Mirror)
	}
	for _, name := range e.Destinations {
		next := "check the destination in --to; log in with \"docker login\", or give --username and --password"
		if tarball.Is(name) {
			next = "check the name of the bucket or folder in --to"
		}
		try("destination", name, "may be written", next, e.m.Destination)
		e.licence(ctx, name)
	}
	if e.Key != "" {
		try("key", e.Key, "is loadable", "check the value of --key, or make a key: builder keygen FILE", e.m.Key)
	}
}

// Err returns nil if no check failed. Otherwise the error has the class and the hint of the first failure, which may be
// the cause of the later ones.
func (r *Report) Err() error {
	n, first := 0, -1
	for i, f := range r.Findings {
		if f.Level == Fail {
			if n++; first < 0 {
				first = i
			}
		}
	}
	if n == 0 {
		return nil
	}
	kind, err := fault.Parse(r.Findings[first].Class)
	if err != nil {
		return err
	}
	return fault.New(kind, fmt.Sprintf("this machine cannot build: %d of %d checks fail; the first of them is %s", n,
		len(r.Findings), r.Findings[first].Check), r.Findings[first].Next)
}

func size(bytes int64) string {
	if bytes < 10<<30 {
		return fmt.Sprintf("%.1f GiB", float64(bytes)/(1<<30))
	}
	return fmt.Sprintf("%d GiB", bytes>>30)
}
