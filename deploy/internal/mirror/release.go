package mirror

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// The packages of one NVIDIA release. Debian splits NVIDIA's runfile into packages, and the mirror makes a runfile of
// those that a compute node needs: CUDA, NVML, video, OpenCL, tools and firmware. The mirror leaves out X11, 32-bit
// libraries and documentation.
var (
	sourcePackage     = "nvidia-kernel-source"
	openSourcePackage = "nvidia-open-kernel-source"
	driverPackages    = []string{
		"firmware-nvidia-gsp", "nvidia-smi", "libcuda1", "libnvidia-ml1", "libnvidia-ptxjitcompiler1", "libnvidia-nvvm4",
		"libnvcuvid1", "libnvidia-encode1", "libnvidia-opticalflow1", "libnvidia-cfg1", "nvidia-opencl-icd",
		"nvidia-cuda-mps",
	}
	// driverTools are tools that Debian builds separately. A tool is of the release's branch, but may have another version
	// than the release.
	driverTools = []string{"nvidia-modprobe", "nvidia-persistenced"}
	// onlyPlain are the packages that exist only in the [line] "".
	onlyPlain = []string{"nvidia-cuda-mps"}
)

// line is one of Debian's sets of NVIDIA packages. The line "" has the plain packages, such as nvidia-smi. Older
// branches have lines too: nvidia-tesla-535-smi is in the line "tesla-535".
type line string

// packageName returns the name that a plain package has in the line.
func (l line) packageName(plain string) string {
	if l == "" || slices.Contains(driverTools, plain) {
		return plain
	}
	for _, prefix := range []string{"firmware-nvidia-", "libnvidia-", "nvidia-"} {
		if rest, ok := strings.CutPrefix(plain, prefix); ok {
			return prefix + string(l) + "-" + rest
		}
	}
	return "libnvidia-" + string(l) + "-" + strings.TrimPrefix(plain, "lib")
}

// hasNo reports whether the line lacks the package that corresponds to a plain package.
func (l line) hasNo(plain string) bool { return l != "" && slices.Contains(onlyPlain, plain) }

// release is one NVIDIA release in Debian.
type release struct {
	version  string // such as 535.261.03
	apt      *apt   // source of the packages
	line     line
	packages []pkg
	open     bool // the release has the sources of the open flavour too
}

// sourceVersion returns the version of the release's source packages.
func (r release) sourceVersion() string {
	for _, p := range r.packages {
		if strings.HasPrefix(p.Name, r.line.packageName(sourcePackage)) {
			return p.Version
		}
	}
	return ""
}

// onlySources returns the packages with module sources.
func (r release) onlySources() []pkg {
	return slices.DeleteFunc(slices.Clone(r.packages), func(p pkg) bool {
		return !strings.HasPrefix(p.Name, r.line.packageName(sourcePackage)) &&
			!strings.HasPrefix(p.Name, r.line.packageName(openSourcePackage))
	})
}

func (r release) flavours() []target.Flavour {
	if r.open {
		return []target.Flavour{target.Proprietary, target.Open}
	}
	return []target.Flavour{target.Proprietary}
}

// findReleases returns the complete releases of a line in apt's index.
func findReleases(ctx context.Context, a *apt, p platform, l line) ([]release, error) {
	var ask []string
	plain := slices.Concat([]string{sourcePackage, openSourcePackage}, driverPackages, driverTools)
	for _, name := range plain {
		ask = append(ask, l.packageName(name))
	}
	versions, err := a.versions(ctx, p.aptNames(ask...)...)
	if err != nil {
		return nil, err
	}
	versions = p.plainNames(versions)
	byPlain := map[string][]string{}
	for i, name := range plain {
		byPlain[name] = versions[ask[i]]
	}
	releases := wholeReleases(byPlain, l)
	for i := range releases {
		r := &releases[i]
		r.apt = a
		for j := range r.packages {
			r.packages[j].Name = l.packageName(r.packages[j].Name) + p.foreign
		}
	}
	return releases, nil
}

// wholeReleases returns the releases whose packages all exist. The keys of versions are the plain names.
func wholeReleases(versions map[string][]string, l line) []release {
	var whole []release
	for _, v := range versions[sourcePackage] {
		r := release{version: pkg{Version: v}.upstream(), line: l}
		if !target.ValidVersion(r.version) {
			continue
		}
		r.packages = append(r.packages, pkg{sourcePackage, v})
		if slices.Contains(versions[openSourcePackage], v) {
			r.open = true
			r.packages = append(r.packages, pkg{openSourcePackage, v})
		}
		if !r.addPackages(versions, v) {
			continue
		}
		r.addTools(versions)
		whole = append(whole, r)
	}
	return whole
}

// findDrivers returns the releases for the mirror: the default first, then the others in the order of their versions.
func (m *maker) findDrivers(ctx context.Context) (releases []release, err error) {
	own, err := findReleases(ctx, m.apt, m.platform, "")
	if err != nil {
		return nil, err
	}
	if len(m.Branches) == 0 {
		releases, err = selectReleases(own)
	} else {
		releases, err = m.findBranches(ctx, own)
	}
	if err != nil {
		return nil, err
	}
	if m.platform.oldest {
		return releases[:1], nil
	}
	if m.Neighbour {
		r, err := m.findNeighbour(ctx, releases)
		if err != nil {
			return nil, err
		}
		releases = append(releases, r)
	}
	slices.SortStableFunc(releases[1:], func(a, b release) int { return target.CompareVersions(a.version, b.version) })
	return releases, nil
}

// findBranches returns the driver releases of the branches in m.Branches. A branch comes from the machine's own Debian
// release if possible, else from the next one.
func (m *maker) findBranches(ctx context.Context, own []release) (releases []release, err error) {
	for _, branch := range m.Branches {
		of := ofBranch(own, branch)
		if len(of) == 0 {
			a, err := m.openNext(ctx)
			if err != nil {
				return nil, err
			}
			next, err := findReleases(ctx, a, m.platform, "")
			if err != nil {
				return nil, err
			}
			if of = ofBranch(next, branch); len(of) == 0 {
				var have []string
				for _, r := range slices.Concat(own, next) {
					have = append(have, target.Branch(r.version))
				}
				slices.Sort(have)
				return nil, fault.New(fault.InputMissing, "find drivers: Debian 12 and 13 have no release of branch "+branch,
					"choose --driver-branch from "+strings.Join(slices.Compact(have), ", "))
			}
		}
		picked, err := selectReleases(of)
		if err != nil {
			return nil, err
		}
		releases = append(releases, picked...)
	}
	return releases, nil
}

// findNeighbour returns a release of the default driver's branch, from the next Debian release, that is not in
// releases.
func (m *maker) findNeighbour(ctx context.Context, releases []release) (release, error) {
	a, err := m.openNext(ctx)
	if err != nil {
		return release{}, err
	}
	branch := target.Branch(releases[0].version)
	l := line("tesla-" + strings.TrimPrefix(branch, "R"))
	whole, err := findReleases(ctx, a, m.platform, l)
	if err != nil {
		return release{}, err
	}
	newest := newestRelease(ofBranch(whole, branch), func(r release) bool {
		return !slices.ContainsFunc(releases, func(have release) bool { return have.version == r.version })
	})
	if newest == nil {
		return release{}, fault.New(fault.InputMissing,
			fmt.Sprintf("find drivers: Debian 13 has no other release of %s among its %s packages", branch, l),
			"remove --neighbour")
	}
	return *newest, nil
}

// ofBranch returns the releases of a branch; "" means any.
func ofBranch(releases []release, branch string) []release {
	return slices.DeleteFunc(slices.Clone(releases),
		func(r release) bool { return branch != "" && target.Branch(r.version) != branch })
}

// newestRelease returns the newest wanted release, or nil.
func newestRelease(releases []release, wanted func(release) bool) *release {
	var newest *release
	for i, r := range releases {
		if wanted(r) && (newest == nil || target.CompareVersions(r.version, newest.version) > 0) {
			newest = &releases[i]
		}
	}
	return newest
}

// selectReleases returns the newest release that has both flavours, and the newest release of all if that is another
// one.
func selectReleases(whole []release) ([]release, error) {
	both := newestRelease(whole, func(r release) bool { return r.open })
	newest := newestRelease(whole, func(release) bool { return true })
	if both == nil {
		return nil, fault.New(fault.InputMissing,
			"find drivers: apt knows no NVIDIA release with the sources of both flavours",
			"make sure that the machine's archive serves contrib and non-free, and run again with --refresh")
	}
	if newest.version == both.version {
		return []release{*both}, nil
	}
	return []release{*both, *newest}, nil
}

// addPackages adds driverPackages in version v to the release's packages. It reports whether the index has all of them
// in this version.
func (r *release) addPackages(versions map[string][]string, v string) bool {
	for _, name := range driverPackages {
		if r.line.hasNo(name) {
			continue
		}
		if !slices.Contains(versions[name], v) {
			return false
		}
		r.packages = append(r.packages, pkg{name, v})
	}
	return true
}

// addTools adds one version of each tool: the newest of the branch that is not newer than the release, or else the
// oldest of the branch.
func (r *release) addTools(versions map[string][]string) {
	for _, name := range driverTools {
		var best string
		for _, v := range versions[name] { // the newest comes first
			if target.Branch(pkg{Version: v}.upstream()) != target.Branch(r.version) {
				continue
			}
			if best = v; target.CompareVersions(cleanVersion(v), r.version) <= 0 {
				break
			}
		}
		if best != "" {
			r.packages = append(r.packages, pkg{name, best})
		}
	}
}

func cleanVersion(v string) string { return pkg{Version: v}.upstream() }

// baseOf returns a release of the same branch that has both flavours, for undoing Debian's edits.
func baseOf(r release, releases []release) (release, bool) {
	if r.open {
		return r, true
	}
	i := slices.IndexFunc(releases,
		func(b release) bool { return b.open && target.Branch(b.version) == target.Branch(r.version) })
	if i < 0 {
		return release{}, false
	}
	return releases[i], true
}
