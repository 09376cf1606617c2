// Package mirror makes folders from Debian's packages in the layout of COS's release bucket and of COS's bucket of
// NVIDIA drivers. With them, Prebake can be tried with real kernels and a real driver where only Debian's archive can
// be reached.
//
// The package does not change the machine: apt uses sources, lists and caches of its own, and nothing is installed. The
// package pins no versions of Debian's packages, but the same versions give the same bytes. What Debian 12 lacks comes
// from packages of Debian 13.
package mirror

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Config says what to make and where.
type Config struct {
	// Out is the folder of the mirror. It is made if it is missing.
	Out string
	// Cache is the folder for Debian packages and finished objects. It is made if it is missing.
	Cache string
	// Board is the COS board of the builds for amd64; "" means lakitu. Builds for arm64 always have lakitu-arm64.
	Board string
	// Archs are the architectures; an empty list means amd64. For arm64 the mirror gets one driver and one kernel. If
	// the field ABIs is set, the mirror gets the kernels of that list instead of one.
	Archs []target.Arch
	// Series are the kernel series, 6.1 and 6.12; an empty list means 6.1, the series of Debian 12 itself. 6.12 is for
	// amd64 only.
	Series []string
	// Kernels is the number of kernels of 6.1 if ABIs is empty: half the oldest in Debian's index, and half the newest. 0
	// means four, or all if there are fewer. Of any other series the mirror has only the newest kernel.
	Kernels int
	// ABIs selects kernels by Debian's ABI number. If ABIs is not empty, Kernels has no effect.
	ABIs []int
	// Branches are the driver branches, such as R535, the default driver's first. An empty list means the branches of
	// Debian 12. Other branches come from Debian 13, with Debian's edits in the sources, and for amd64 only.
	Branches []string
	// Neighbour adds one more release of the default driver's branch, from Debian 13, in the proprietary flavour and for
	// amd64 only.
	Neighbour bool
	// VMLinux adds vmlinux for each kernel, extracted from the boot image: an ELF file with BTF types. It is for amd64
	// only.
	VMLinux bool
	// NoBoot leaves prebake-boot.tgz out, as COS's buckets do. A load test then boots vmlinux.
	NoBoot bool
	// OnlyKernels leaves out the drivers.
	OnlyKernels bool
	// Clang adds a kernel that the mirror compiles with clang, as COS does: without symbol versions, with module
	// signatures and LoadPin. OnlyClang leaves out Debian's own kernels.
	Clang, OnlyClang bool
	// ClangCached uses the clang-built kernel of an earlier run, and compiles no kernel.
	ClangCached bool
	// Refresh fetches the current package index first. If Refresh is false, an index that is less than a day old is
	// used.
	Refresh bool
	// EmuGPU compiles the emulated GPU for a kernel, and returns the path of the module. headersDir is the header tree,
	// and env the content of toolchain_env. EmuGPU may be called for two kernels at once. If EmuGPU is nil,
	// prebake-boot.tgz has no emugpu.ko.
	EmuGPU func(ctx context.Context, arch target.Arch, headersDir, toolchainDir string, env map[string]string,
		release string) (koPath string, err error)
	// EmuGPURevision is the revision of the emulated GPU's source. If an earlier run had another revision, the module
	// is compiled again.
	EmuGPURevision string
	// Progress receives a line of text at each step; nil means no progress.
	Progress func(string)
	// xzPreset is xz's preset for toolchain archives; "" means -3.
	xzPreset string
}

// WithDefaults returns c with its defaults filled in.
func (c Config) WithDefaults() Config {
	if c.Board == "" {
		c.Board = "lakitu"
	}
	if len(c.Series) == 0 {
		c.Series = []string{ownSeries}
	}
	c.Clang = c.Clang || c.OnlyClang
	if len(c.Archs) == 0 {
		c.Archs = []target.Arch{target.AMD64}
	}
	if c.Progress == nil {
		c.Progress = func(string) {}
	}
	c.xzPreset = cmp.Or(c.xzPreset, xzDefault)
	return c
}

// Validate returns all errors in c.
func (c Config) Validate() error {
	var errs []error
	if c.Out == "" || c.Cache == "" {
		errs = append(errs, fault.New(fault.Usage, "make a mirror: want an output folder and a cache folder",
			"pass --out and --cache"))
	}
	if c.Kernels < 0 || c.Kernels == 1 {
		errs = append(errs, fault.New(fault.Usage, fmt.Sprintf("make a mirror with --kernels %d: want 2 or more", c.Kernels),
			"pass --kernels 2, or a higher number"))
	}
	if _, err := target.ParseKernel("1.1.1", c.Board); err != nil {
		errs = append(errs, fault.Wrap(fault.Usage, err, ""))
	} else if target.BoardArch(c.Board) != target.AMD64 {
		errs = append(errs, fault.New(fault.Usage, "board "+c.Board+": want a board for amd64",
			"for amd64, pass --board lakitu; for lakitu-arm64, pass no --board, but --arch arm64"))
	}
	for i, arch := range c.Archs {
		if _, ok := platforms[arch]; !ok || slices.Contains(c.Archs[:i], arch) {
			errs = append(errs, fault.New(fault.Usage, fmt.Sprintf("architecture %q: want amd64 or arm64, each at most once",
				arch),
				"pass --arch amd64,arm64"))
		}
	}
	for i, series := range c.Series {
		if buildMajors[series] == 0 || slices.Contains(c.Series[:i], series) {
			errs = append(errs, fault.New(fault.Usage, fmt.Sprintf("kernel series %q: want 6.1 or 6.12, each at most once",
				series),
				"pass --kernel-series 6.1,6.12"))
		}
	}
	if slices.Contains(c.Archs, target.ARM64) && !slices.Equal(c.Series, []string{ownSeries}) {
		errs = append(errs, fault.New(fault.Usage, "kernel series other than "+ownSeries+" are for amd64 only",
			"remove one of --kernel-series and --arch arm64"))
	}
	for i, branch := range c.Branches {
		if _, ok := target.Wish(branch).BranchName(); !ok || slices.Contains(c.Branches[:i], branch) {
			errs = append(errs, fault.New(fault.Usage, fmt.Sprintf(
				"driver branch %q: want a branch such as R535, each at most once", branch),
				"pass --driver-branch R535,R550"))
		}
	}
	if slices.Contains(c.Archs, target.ARM64) && (len(c.Branches) > 0 || c.Neighbour) {
		errs = append(errs, fault.New(fault.Usage, "drivers other than Debian 12's default are for amd64 only",
			"remove either --arch arm64, or both --driver-branch and --neighbour"))
	}
	if c.VMLinux && slices.Contains(c.Archs, target.ARM64) {
		errs = append(errs, fault.New(fault.Usage,
			"add vmlinux for arm64: Debian's kernel image for arm64 contains no vmlinux",
			"remove one of --vmlinux and --arch arm64"))
	}
	return errors.Join(errs...)
}

// Build is one COS build of the mirror.
type Build struct {
	BuildID string `json:"buildId"`
	Board   string `json:"board"`
	Release string `json:"release"`
	// DebianPackageVersion is the version of the kernel's Debian packages.
	DebianPackageVersion string `json:"debianPackageVersion"`
	Note                 string `json:"note,omitempty"`
}

// Driver is one NVIDIA release of the mirror.
type Driver struct {
	Version  string           `json:"version"`
	Flavours []target.Flavour `json:"flavours"`
	// Note says why the sources differ from NVIDIA's; "" means that they do not.
	Note string `json:"note,omitempty"`
}

// Result is the content of the mirror. It is also written to mirror.json.
type Result struct {
	Builds  []Build  `json:"builds"`
	Drivers []Driver `json:"drivers"`
	// Made is the number of objects that this run made, and Cached the number that it took from the cache.
	Made   int `json:"-"`
	Cached int `json:"-"`
}

// tools are the programs that this package runs, with the Debian package of each.
var tools = []struct{ name, pkg string }{
	{"apt-get", "apt"}, {"apt-cache", "apt"}, {"dpkg-deb", "dpkg"}, {"xz", "xz-utils"},
	{"zstd", "zstd"}, {"patch", "patch"}, {"diff", "diffutils"}, {"makeself", "makeself"}, {"patchelf", "patchelf"},
	{"tar", "tar"},
}

func checkTools() error {
	var missing []string
	for _, t := range tools {
		if _, err := exec.LookPath(t.name); err != nil {
			missing = append(missing, t.pkg)
		}
	}
	if len(missing) > 0 {
		return fault.New(fault.Usage, "make a mirror: these Debian packages are missing: "+strings.Join(missing, ", "),
			"install them: apt-get install "+strings.Join(missing, " "))
	}
	return nil
}

// maker makes the part of the mirror for one architecture.
type maker struct {
	Config
	platform platform
	apt      *apt
	next     *apt // for the next Debian release; nil until openNext is called
	refresh  bool
	store    store
	// toolchainPkgs are the packages of the toolchain archive.
	toolchainPkgs []pkg
	toolchain     *toolchainFolder

	mu     sync.Mutex
	result Result
	notes  map[string]string // notes on drivers, by version
}

// Make makes the mirror, or completes it.
func Make(ctx context.Context, c Config) (result Result, err error) {
	c = c.WithDefaults()
	if err := errors.Join(c.Validate(), checkTools()); err != nil {
		return Result{}, err
	}
	if c.Clang && !c.ClangCached { // only a compile needs the tools
		if err := checkClangTools(); err != nil {
			return Result{}, err
		}
	}
	for _, dir := range []*string{&c.Out, &c.Cache} {
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return Result{}, err
		}
		if err := os.MkdirAll(abs, 0o755); err != nil {
			return Result{}, err
		}
		*dir = abs
	}
	unlock, err := lock(ctx, c)
	if err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	for _, arch := range slices.Sorted(slices.Values(c.Archs)) {
		if arch != target.AMD64 {
			c.Clang, c.OnlyClang = false, false // the clang-built kernel is for amd64
		}
		part, err := makePart(ctx, c, platforms[arch])
		if err != nil {
			return Result{}, err
		}
		result.add(part)
	}
	text, err := json.MarshalIndent(result, "", "  ")
	if err != nil {
		return Result{}, err
	}
	return result, putFile(filepath.Join(c.Out, "mirror.json"), string(text)+"\n")
}

// makePart makes the part of the mirror for one architecture.
func makePart(ctx context.Context, c Config, p platform) (Result, error) {
	for refresh := c.Refresh; ; refresh = true {
		a, err := openApt(ctx, filepath.Join(c.Cache, p.aptDir()), p, false, refresh, c.Progress)
		if err != nil {
			return Result{}, err
		}
		m := &maker{Config: c, platform: p, apt: a, refresh: refresh, store: store{filepath.Join(c.Cache, "objects")},
			notes: map[string]string{}}
		if err = m.run(ctx); err == nil {
			return m.result, nil
		}
		if refresh || a.fresh && (m.next == nil || m.next.fresh) || !errors.Is(err, errDownload) {
			return Result{}, err
		}
		c.Progress("Debian's archive no longer has a package of the stored index: fetching the current index")
	}
}

// openNext returns the apt for the next Debian release. The first call prepares it.
func (m *maker) openNext(ctx context.Context) (_ *apt, err error) {
	if m.next == nil {
		m.next, err = openApt(ctx, filepath.Join(m.Cache, m.platform.aptDir()+"-"+nextCodename), m.platform, true, m.refresh,
			m.Progress)
	}
	return m.next, err
}

// add adds the content of one part of the mirror.
func (r *Result) add(part Result) {
	r.Builds = append(r.Builds, part.Builds...)
	for _, d := range part.Drivers {
		if !slices.ContainsFunc(r.Drivers, func(have Driver) bool { return have.Version == d.Version }) {
			r.Drivers = append(r.Drivers, d)
		}
	}
	r.Made, r.Cached = r.Made+part.Made, r.Cached+part.Cached
}

func (m *maker) run(ctx context.Context) error {
	all, err := findKernels(ctx, m.apt, m.platform, m.Series)
	if err != nil {
		return err
	}
	var kernels []kernel
	if !m.OnlyClang {
		if kernels, err = m.platform.selectKernels(all, m.ABIs, m.Kernels); err != nil {
			return err
		}
	}
	releases, err := m.findDrivers(ctx)
	if err != nil {
		return err
	}
	versions, err := m.apt.versions(ctx, m.platform.toolchain...)
	if err != nil {
		return err
	}
	for _, name := range m.platform.toolchain {
		if len(versions[name]) == 0 {
			return fault.New(fault.Unsupported, "find toolchain: apt knows no "+name, "run on Debian 12 for amd64")
		}
		m.toolchainPkgs = append(m.toolchainPkgs, pkg{name, versions[name][0]})
	}
	want := append([]pkg(nil), m.toolchainPkgs...)
	var wantNext []pkg
	for _, k := range kernels {
		m.Progress("kernel " + k.release + " (Debian " + k.version + ")")
		want = append(want, k.packages()...)
	}
	for _, r := range releases {
		m.Progress(fmt.Sprintf("driver %s, %v", r.version, r.flavours()))
		switch {
		case m.OnlyKernels:
		case r.apt == m.apt:
			want = append(want, r.packages...)
		default:
			wantNext = append(wantNext, r.packages...)
		}
	}
	var clang clangBuild
	if m.Clang {
		if clang, err = m.planClang(ctx); err != nil {
			return err
		}
		want = append(want, clang.packages()...)
	}
	if err := m.apt.download(ctx, want); err != nil {
		return err
	}
	if len(wantNext) > 0 {
		if err := m.next.download(ctx, wantNext); err != nil {
			return err
		}
	}
	builds := m.plan(kernels)
	if err := m.makeAll(ctx, builds, releases); err != nil {
		return err
	}
	for _, b := range builds {
		m.result.Builds = append(m.result.Builds, b.Build)
	}
	if m.Clang {
		b, err := m.makeClang(ctx, clang, releases)
		if err != nil {
			return err
		}
		m.result.Builds = append(m.result.Builds, b)
	}
	for _, r := range releases {
		m.result.Drivers = append(m.result.Drivers, Driver{r.version, r.flavours(), m.notes[r.version]})
	}
	return nil
}

// build is one COS build of the mirror.
type build struct {
	Build
	kernel kernel
	second bool // the second COS build with the same kernel
	mtime  time.Time
}

func (m *maker) plan(kernels []kernel) []build {
	var builds []build
	for i, k := range kernels {
		b := build{kernel: k, mtime: epoch,
			Build: Build{BuildID: fmt.Sprintf("%d.0.%d", k.buildMajor(), k.abi), Board: m.platform.board(m.Board),
				Release: k.release, DebianPackageVersion: k.version}}
		builds = append(builds, b)
		if i == 1 {
			b.BuildID, b.second, b.mtime = fmt.Sprintf("%d.1.%d", k.buildMajor(), k.abi), true, epoch.AddDate(0, 0, 7)
			b.Note = "second build of the kernel of " + builds[i].BuildID + ": other build time, host and user, one fingerprint"
			builds = append(builds, b)
		}
	}
	return builds
}

// makeAll makes the toolchain first, because the emulated GPU needs it. Then it makes drivers and COS builds, two at a
// time.
func (m *maker) makeAll(ctx context.Context, builds []build, releases []release) (err error) {
	var toolchain object
	if len(builds) > 0 {
		if toolchain, err = m.makeToolchain(ctx); err != nil {
			return err
		}
	}
	m.toolchain = &toolchainFolder{object: toolchain}
	defer func() { err = errors.Join(err, m.toolchain.remove()) }()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	if !m.OnlyKernels {
		for _, r := range releases {
			g.Go(func() error { return m.makeDriver(ctx, r, releases) })
		}
	}
	for _, same := range byKernel(builds) {
		g.Go(func() error {
			for _, b := range same {
				if err := m.makeBuild(ctx, b, toolchain, releases); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// byKernel splits the COS builds into one list for each kernel. The builds of one list are made one after the other, so
// that an object that they share is made only once.
func byKernel(builds []build) [][]build {
	var groups [][]build
	for i, b := range builds {
		if i > 0 && builds[i-1].kernel.release == b.kernel.release {
			groups[len(groups)-1] = append(groups[len(groups)-1], b)
			continue
		}
		groups = append(groups, []build{b})
	}
	return groups
}

// object returns an object from the cache or makes it, and reports the progress.
func (m *maker) object(ctx context.Context, what string, r recipe,
	write func(context.Context, io.Writer) error) (object, error) {
	start := time.Now()
	o, err := m.store.make(ctx, r, write)
	if err != nil {
		return o, fmt.Errorf("make %s: %w", what, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if o.cached {
		m.result.Cached++
		m.Progress(fmt.Sprintf("%s: cached, %.1f MB", what, float64(o.Size)/1e6))
		return o, nil
	}
	m.result.Made++
	m.Progress(fmt.Sprintf("%s: made, %.1f MB in %.1f s", what, float64(o.Size)/1e6, time.Since(start).Seconds()))
	return o, nil
}
