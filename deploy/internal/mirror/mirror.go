// Package mirror makes, out of Debian's packages, folders that look exactly
// like a COS release bucket and COS's bucket of NVIDIA drivers. With them
// everything that Prebake does can be tried on a machine that reaches nothing
// but Debian's archive, on real kernels and a real driver.
//
// It refuses to change the machine: apt runs on sources, lists and caches of
// its own, nothing is installed, no root is needed. It pins no version: apt is
// asked what there is. The same package versions give the same bytes. Where more
// is asked for than Debian 12 has, packages of Debian 13 are unpacked as well.
package mirror

import (
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
	// Out is the folder of the mirror; it is created.
	Out string
	// Cache keeps Debian packages and finished objects; it is created.
	Cache string
	// Board is the COS board to lay the builds for amd64 out for; "" means lakitu.
	// Those for arm64 are for lakitu-arm64.
	Board string
	// Archs are the architectures; an empty list means amd64. For arm64 the mirror
	// gets one kernel and one driver, unless ABIs names more kernels.
	Archs []target.Arch
	// Series are the kernel series, 6.1 and 6.12; an empty list means 6.1, Debian
	// 12's own. The others are for amd64 only.
	Series []string
	// Kernels is how many kernels of 6.1 to take when ABIs is empty: half of them
	// the oldest in Debian's index, half the newest. 0 means four, or all if there
	// are fewer. Of another series the mirror gets the newest kernel.
	Kernels int
	// ABIs picks kernels by Debian's ABI number instead.
	ABIs []int
	// Branches are the driver branches, as in R535, the default's first; an empty
	// list means what Debian 12 has. A branch that Debian 12 lacks comes out of
	// Debian 13, with the sources as Debian edited them, for amd64 only.
	Branches []string
	// Neighbour adds one more release of the default's branch, proprietary alone,
	// which Debian 13 keeps beside its own driver. It is for amd64 only.
	Neighbour bool
	// VMLinux adds the kernels as they were linked, with their types, where they can
	// be taken out of what boots: those for amd64.
	VMLinux bool
	// NoBoot leaves prebake-boot.tgz out, which no COS bucket has: a load test then
	// boots vmlinux.
	NoBoot bool
	// OnlyKernels leaves the drivers out.
	OnlyKernels bool
	// Clang adds a kernel that is compiled here, with clang, as COS does: no
	// symbol versions, module signatures, LoadPin. OnlyClang leaves Debian's own
	// kernels out.
	Clang, OnlyClang bool
	// ClangCached takes the clang-built kernel as an earlier run compiled it, and
	// compiles none.
	ClangCached bool
	// Refresh asks Debian's archive for its present index first; without it an
	// index of the last day is good enough.
	Refresh bool
	// EmuGPU compiles the emulated GPU against a kernel and returns the module's
	// path; nil leaves emugpu.ko out of prebake-boot.tgz. headersDir is the header
	// tree itself, env is toolchain_env. It may be called for two kernels at once.
	EmuGPU func(ctx context.Context, arch target.Arch, headersDir, toolchainDir string, env map[string]string,
		release string) (koPath string, err error)
	// EmuGPURevision names the emulated GPU's source: another one, another module.
	EmuGPURevision string
	// Progress receives what is being done, a line at a time; nil means silent.
	Progress func(string)
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
	return c
}

// Validate reports all that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	if c.Out == "" || c.Cache == "" {
		errs = append(errs, fault.New(fault.Usage, "mirror needs an output folder and a cache folder",
			"pass --out and --cache"))
	}
	if c.Kernels < 0 || c.Kernels == 1 {
		errs = append(errs, fault.New(fault.Usage, fmt.Sprintf("%d kernels: want 2 or more", c.Kernels), "pass --kernels 3"))
	}
	if _, err := target.ParseKernel("1.1.1", c.Board); err != nil {
		errs = append(errs, fault.Wrap(fault.Usage, err, ""))
	} else if target.BoardArch(c.Board) != target.AMD64 {
		errs = append(errs, fault.New(fault.Usage, "board "+c.Board+": want one for amd64",
			"use --board lakitu; --arch arm64 makes builds for lakitu-arm64"))
	}
	for i, arch := range c.Archs {
		if _, ok := platforms[arch]; !ok || slices.Contains(c.Archs[:i], arch) {
			errs = append(errs, fault.New(fault.Usage, fmt.Sprintf("architecture %q: want amd64 or arm64, each once", arch),
				"pass --arch amd64,arm64"))
		}
	}
	for i, series := range c.Series {
		if buildMajors[series] == 0 || slices.Contains(c.Series[:i], series) {
			errs = append(errs, fault.New(fault.Usage, fmt.Sprintf("kernel series %q: want 6.1 or 6.12, each once", series),
				"pass --kernel-series 6.1,6.12"))
		}
	}
	if slices.Contains(c.Archs, target.ARM64) && !slices.Equal(c.Series, []string{ownSeries}) {
		errs = append(errs, fault.New(fault.Usage, "kernel series other than "+ownSeries+" are for amd64 only",
			"leave out --kernel-series, or --arch arm64"))
	}
	for i, branch := range c.Branches {
		if _, ok := target.Wish(branch).BranchName(); !ok || slices.Contains(c.Branches[:i], branch) {
			errs = append(errs, fault.New(fault.Usage, fmt.Sprintf("driver branch %q: want one such as R535, each once", branch),
				"pass --driver-branch R535,R550"))
		}
	}
	if slices.Contains(c.Archs, target.ARM64) && (len(c.Branches) > 0 || c.Neighbour) {
		errs = append(errs, fault.New(fault.Usage, "other drivers than Debian 12's default are for amd64 only",
			"leave out --driver-branch and --neighbour, or --arch arm64"))
	}
	if c.VMLinux && slices.Contains(c.Archs, target.ARM64) {
		errs = append(errs, fault.New(fault.Usage, "vmlinux for arm64: its kernel's image holds none",
			"leave out --vmlinux, or --arch arm64"))
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
	// Note says why the sources are not as NVIDIA has them, if so.
	Note string `json:"note,omitempty"`
}

// Result says what the mirror holds; it is also written to mirror.json.
type Result struct {
	Builds  []Build  `json:"builds"`
	Drivers []Driver `json:"drivers"`
	// Made and Cached count the objects that this run made and took from the cache.
	Made   int `json:"-"`
	Cached int `json:"-"`
}

// tools are the programs that the mirror runs, and the Debian package of each.
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
		return fault.New(fault.Usage, "programs are missing on this machine: "+strings.Join(missing, ", "),
			"apt-get install "+strings.Join(missing, " "))
	}
	return nil
}

// maker makes the mirror's part of one architecture.
type maker struct {
	Config
	platform platform
	apt      *apt
	next     *apt // of the next Debian release, once it was needed
	refresh  bool
	store    store
	// toolchainPkgs is what the toolchain archive is made of.
	toolchainPkgs []pkg
	toolchain     *unpacked

	mu     sync.Mutex
	result Result
	notes  map[string]string // on drivers, by version
}

// Make makes or completes the mirror.
func Make(ctx context.Context, c Config) (result Result, err error) {
	c = c.WithDefaults()
	if err := errors.Join(c.Validate(), checkTools()); err != nil {
		return Result{}, err
	}
	if c.Clang {
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
			c.Clang, c.OnlyClang = false, false // it is a kernel for amd64
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

// makePart makes the mirror's part of one architecture.
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
		c.Progress("Debian's archive no longer has a package of the index at hand: asking for the present one")
	}
}

// openNext returns the archive of the next Debian release.
func (m *maker) openNext(ctx context.Context) (_ *apt, err error) {
	if m.next == nil {
		m.next, err = openApt(ctx, filepath.Join(m.Cache, m.platform.aptDir()+"-"+nextCodename), m.platform, true, m.refresh,
			m.Progress)
	}
	return m.next, err
}

// add takes over what a part of the mirror holds.
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

// build is one COS build to lay out.
type build struct {
	Build
	kernel kernel
	second bool // the other build of the same kernel
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

// makeAll makes the toolchain first, since the emulated GPU is compiled with
// it, and then everything else, two at a time.
func (m *maker) makeAll(ctx context.Context, builds []build, releases []release) (err error) {
	var toolchain object
	if len(builds) > 0 {
		if toolchain, err = m.makeToolchain(ctx); err != nil {
			return err
		}
	}
	m.toolchain = &unpacked{object: toolchain}
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

// byKernel puts builds of one kernel together: they share objects, which
// should be made once.
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

// object makes or recalls one object and says so.
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
