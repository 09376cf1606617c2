package mirror

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// The packages of one NVIDIA release. Debian splits the runfile; the mirror
// puts together again what a compute node wants: CUDA, NVML, video, OpenCL,
// tools and firmware, without X11, 32-bit libraries and documentation.
var (
	sourcePackage     = "nvidia-kernel-source"
	openSourcePackage = "nvidia-open-kernel-source"
	driverPackages    = []string{
		"firmware-nvidia-gsp", "nvidia-smi", "libcuda1", "libnvidia-ml1", "libnvidia-ptxjitcompiler1", "libnvidia-nvvm4",
		"libnvcuvid1", "libnvidia-encode1", "libnvidia-opticalflow1", "libnvidia-cfg1", "nvidia-opencl-icd", "nvidia-cuda-mps",
	}
	// driverTools are built apart by Debian and follow the branch, not the release.
	driverTools = []string{"nvidia-modprobe", "nvidia-persistenced"}
	// notOfLine is what a line of packages beside the plain one lacks.
	notOfLine = []string{"nvidia-cuda-mps"}
)

// line is which of Debian's packages a release is made of: the plain ones, "", or
// those of an older branch that it keeps beside them, such as "tesla-535".
type line string

// named returns the name that a plain package has in the line.
func (l line) named(plain string) string {
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

// lacks tells a package that the line does not have.
func (l line) lacks(plain string) bool { return l != "" && slices.Contains(notOfLine, plain) }

// release is one NVIDIA release as Debian has it.
type release struct {
	version  string // 535.261.03
	apt      *apt   // where the packages come from
	line     line
	packages []pkg
	open     bool
}

// sourceVersion is the version of the release's source packages.
func (r release) sourceVersion() string {
	for _, p := range r.packages {
		if strings.HasPrefix(p.Name, r.line.named(sourcePackage)) {
			return p.Version
		}
	}
	return ""
}

// onlySources are the packages with module sources.
func (r release) onlySources() []pkg {
	return slices.DeleteFunc(slices.Clone(r.packages), func(p pkg) bool {
		return !strings.HasPrefix(p.Name, r.line.named(sourcePackage)) && !strings.HasPrefix(p.Name, r.line.named(openSourcePackage))
	})
}

func (r release) flavours() []target.Flavour {
	if r.open {
		return []target.Flavour{target.Proprietary, target.Open}
	}
	return []target.Flavour{target.Proprietary}
}

// findReleases returns the releases of a line that apt knows whole.
func findReleases(ctx context.Context, a *apt, p platform, l line) ([]release, error) {
	var ask []string
	plain := slices.Concat([]string{sourcePackage, openSourcePackage}, driverPackages, driverTools)
	for _, name := range plain {
		ask = append(ask, l.named(name))
	}
	versions, err := a.versions(ctx, p.named(ask...)...)
	if err != nil {
		return nil, err
	}
	versions = p.plain(versions)
	byPlain := map[string][]string{}
	for i, name := range plain {
		byPlain[name] = versions[ask[i]]
	}
	releases := wholeReleases(byPlain, l)
	for i := range releases {
		r := &releases[i]
		r.apt = a
		for j := range r.packages {
			r.packages[j].Name = l.named(r.packages[j].Name) + p.foreign
		}
	}
	return releases, nil
}

// wholeReleases returns the releases of which all packages exist; the versions are
// by plain names.
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
		if !r.complete(versions, v) {
			continue
		}
		r.addTools(versions)
		whole = append(whole, r)
	}
	return whole
}

// findDrivers returns the releases to lay out: the default first, then the others
// by version.
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

// findBranches takes each branch out of the machine's own Debian release, or out of
// the next one where that has no such branch.
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

// findNeighbour returns one more release of the default's branch, which the next
// Debian release keeps beside its own.
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
		return release{}, fault.New(fault.InputMissing, fmt.Sprintf("find drivers: Debian 13 has no other release of %s among its %s packages", branch, l), "leave out --neighbour")
	}
	return *newest, nil
}

// ofBranch returns the releases of a branch; "" is any.
func ofBranch(releases []release, branch string) []release {
	return slices.DeleteFunc(slices.Clone(releases), func(r release) bool { return branch != "" && target.Branch(r.version) != branch })
}

// newestRelease returns the newest one that is wanted, or nil.
func newestRelease(releases []release, wanted func(release) bool) *release {
	var newest *release
	for i, r := range releases {
		if wanted(r) && (newest == nil || target.CompareVersions(r.version, newest.version) > 0) {
			newest = &releases[i]
		}
	}
	return newest
}

// selectReleases picks the newest release that has both flavours and the newest of
// all, in that order; they may be one.
func selectReleases(whole []release) ([]release, error) {
	both := newestRelease(whole, func(r release) bool { return r.open })
	newest := newestRelease(whole, func(release) bool { return true })
	if both == nil {
		return nil, fault.New(fault.InputMissing, "find drivers: apt knows no NVIDIA release with both kernel module sources",
			"make sure that the machine's archive serves contrib and non-free, and run again with --refresh")
	}
	if newest.version == both.version {
		return []release{*both}, nil
	}
	return []release{*both, *newest}, nil
}

// complete adds the release's other packages and reports whether all exist in
// this very version.
func (r *release) complete(versions map[string][]string, v string) bool {
	for _, name := range driverPackages {
		if r.line.lacks(name) {
			continue
		}
		if !slices.Contains(versions[name], v) {
			return false
		}
		r.packages = append(r.packages, pkg{name, v})
	}
	return true
}

// addTools adds of each tool the newest version of the branch that is not
// newer than the release, or the branch's oldest.
func (r *release) addTools(versions map[string][]string) {
	for _, name := range driverTools {
		var best string
		for _, v := range versions[name] { // newest first
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

// runfileTree lays out a release the way that NVIDIA's archive does, and tells
// which of Debian's edits it undid for that.
func (m *maker) runfileTree(ctx context.Context, r release, releases []release) (tree, []string, error) {
	t, err := debianTree(ctx, m.platform, r)
	if err != nil {
		return nil, nil, err
	}
	edits, err := m.makeOwn(ctx, t, r, releases)
	if err != nil {
		return nil, nil, err
	}
	if err := finish(t, m.platform, r); err != nil {
		return nil, nil, err
	}
	return t, edits, nil
}

// makeOwn puts NVIDIA's own module sources in the place of Debian's edition of
// them. Where they cannot be had, Debian's stay, and the list says so.
func (m *maker) makeOwn(ctx context.Context, t tree, r release, releases []release) (edits []string, err error) {
	var s sources
	base, ok := baseOf(r, releases)
	switch {
	case m.platform.foreign != "":
		return []string{debianEdition + "only amd64's is changed back"}, nil
	case r.open:
		s, err = m.ownSources(ctx, r, t)
	case ok:
		s, err = m.likeSources(ctx, base, t)
	default:
		return []string{debianEdition + "no release of the branch has both flavours"}, nil
	}
	switch {
	case errors.Is(err, errNoOrigin):
		// What apt said is about this machine's archive, and no part of the mirror.
		m.Say(fmt.Sprintf("driver %s stays as Debian edited it: %v", r.version, err))
		return []string{debianEdition + errNoOrigin.Error()}, nil
	case fault.Is(err, fault.Unsupported):
		m.Say(fmt.Sprintf("driver %s stays as Debian edited it: %v", r.version, err))
		return []string{fmt.Sprintf("%s%v", debianEdition, err)}, nil
	case err != nil:
		return nil, err
	}
	t.replace("kernel", s.kernel)
	if r.open {
		t.replace("kernel-open", s.open)
	}
	for _, must := range []string{"conftest-verbose", "NV_CFLAGS_FROM_KBUILD"} {
		if bytes.Contains(t["kernel/Kbuild"].data, []byte(must)) {
			return nil, fault.New(fault.Internal, "undo Debian's edits: Kbuild still has "+must, "")
		}
	}
	return s.edits, nil
}

// debianEdition begins the list of a release whose sources stay Debian's.
const debianEdition = "Debian's edition: "

// baseOf returns the release of the same branch that has both flavours, by which
// Debian's edits of another one are undone.
func baseOf(r release, releases []release) (release, bool) {
	if r.open {
		return r, true
	}
	i := slices.IndexFunc(releases, func(b release) bool { return b.open && target.Branch(b.version) == target.Branch(r.version) })
	if i < 0 {
		return release{}, false
	}
	return releases[i], true
}

// debianTree puts a release's packages together.
func debianTree(ctx context.Context, p platform, r release) (tree, error) {
	t := tree{}
	for _, need := range r.packages {
		file, ok := r.apt.file(need)
		if !ok {
			return nil, fault.New(fault.InputMissing, "package "+need.Name+" is not at hand", "")
		}
		var err error
		switch strings.TrimSuffix(need.Name, p.foreign) {
		case r.line.named(sourcePackage):
			err = addSource(ctx, t, file, r.line.named("nvidia-kernel"), "kernel")
		case r.line.named(openSourcePackage):
			err = addSource(ctx, t, file, r.line.named("nvidia-open-kernel"), "kernel-open")
		default:
			err = readDeb(ctx, t, file, func(name string) string { return p.runfileName(name, r.version) })
		}
		if err != nil {
			return nil, err
		}
	}
	return t, nil
}

// finish adds what is neither in Debian's packages nor in NVIDIA's sources.
func finish(t tree, p platform, r release) error {
	if err := t.addLibraryLinks(r.version); err != nil {
		return err
	}
	for name, n := range t {
		if path.Ext(name) == ".gz" { // manual pages
			delete(t, name)
			continue
		}
		if n.link == "" && !n.dir {
			n.mode = 0o644 | n.mode&0o111
			t[name] = n
		}
	}
	for _, must := range []string{"kernel/Makefile", "kernel/conftest.sh", "kernel/nvidia/nv-kernel.o_binary", "nvidia-smi", "LICENSE", "libcuda.so." + r.version, "libnvidia-ml.so." + r.version} {
		if _, ok := t[must]; !ok {
			return fault.New(fault.InputMissing, fmt.Sprintf("lay out driver %s: no %s in Debian's packages", r.version, must), "")
		}
	}
	t.add("nvidia-installer", node{mode: 0o755, data: []byte(installer)})
	t.addFile(".manifest", manifest(t, p.runfile, r.version))
	return nil
}

// addSource adds the module sources in one of Debian's -source packages, and
// NVIDIA's terms, which every package has a copy of.
func addSource(ctx context.Context, t tree, deb, inside, to string) error {
	outer := tree{}
	err := readDeb(ctx, outer, deb, func(name string) string {
		switch {
		case path.Dir(name) == "usr/src" && strings.HasSuffix(name, ".tar.xz"):
			return "source"
		case path.Base(name) == "copyright":
			return "LICENSE"
		case path.Base(name) == "README.txt.gz":
			return "README.gz"
		}
		return ""
	})
	if err != nil {
		return err
	}
	if n, ok := outer["LICENSE"]; ok && to == "kernel" {
		t.add("LICENSE", n)
	}
	if n, ok := outer["README.gz"]; ok {
		text, err := gunzip(n.data)
		if err != nil {
			return fmt.Errorf("read README of %s: %w", path.Base(deb), err)
		}
		if gpus := supportedGPUs(text); gpus != "" {
			t.addFile("supported-gpus/supported-gpus.json", gpus)
		}
	}
	prefix := "modules/" + inside
	move := under(prefix, to)
	return readXZ(ctx, t, outer["source"].data, func(name string) string {
		// What Debian puts beside NVIDIA's files.
		if name == prefix+"/debian" || strings.HasPrefix(name, prefix+"/debian/") || name == prefix+"/NVIDIA_Changelog" {
			return ""
		}
		return move(name)
	})
}

// runfileName flattens a path of Debian's into the name in NVIDIA's archive;
// "" leaves the file out.
func (p platform) runfileName(name, version string) string {
	dir, base := path.Dir(name), path.Base(name)
	switch {
	case strings.HasPrefix(name, "lib/firmware/nvidia/"+version+"/"), strings.HasPrefix(name, "usr/lib/firmware/nvidia/"+version+"/"):
		return "firmware/" + base
	case (dir == "usr/bin" || dir == "usr/sbin") && strings.HasPrefix(base, "nvidia-"), path.Dir(dir) == "usr/lib/nvidia" && strings.HasPrefix(base, "nvidia-"):
		return base
	case strings.HasPrefix(dir, "usr/lib/"+p.triplet) && strings.HasSuffix(base, ".so."+version):
		return base
	}
	return ""
}

func gunzip(data []byte) ([]byte, error) {
	zr, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(zr, 16<<20))
}

var (
	optionLine = regexp.MustCompile(`(?m)^(\s+--noexec)\)$`)
	skipLine   = regexp.MustCompile(`(?m)^skip="([0-9]+)"$`)
	usizeLine  = regexp.MustCompile(`(?m)^\s*echo Uncompressed size: ([0-9]+) KB$`)
	headerEnds = []byte("\neval $finish; exit $res\n")
)

// fixHeader replaces the size that makeself took from du, which depends on the
// file system, by the sum of the file sizes. The payload stays as it is, and so
// do the number of lines and all checksums.
func fixHeader(file []byte, t tree) ([]byte, error) {
	end := bytes.Index(file, headerEnds)
	if end < 0 {
		return nil, fault.New(fault.Internal, "read makeself header: its last line is not where it should be", "report the version of makeself")
	}
	head := file[:end]
	m := usizeLine.FindSubmatch(head)
	if m == nil {
		return nil, fault.New(fault.Internal, "read makeself header: no uncompressed size", "report the version of makeself")
	}
	var total int64
	for _, n := range t {
		total += int64(len(n.data))
	}
	size := regexp.MustCompile(`\b` + string(m[1]) + `( KB|; then)`)
	fixed := size.ReplaceAll(head, fmt.Appendf(nil, "%d$1", (total+1023)/1024))
	// NVIDIA's header takes -x, with which its callers unpack it, and writes the
	// number of lines without quotes.
	if len(optionLine.FindAll(fixed, -1)) != 1 || !skipLine.Match(fixed) {
		return nil, fault.New(fault.Internal, "read makeself header: no option --noexec or no skip line", "report the version of makeself")
	}
	fixed = optionLine.ReplaceAll(fixed, []byte("$1|-x|--extract-only)"))
	fixed = skipLine.ReplaceAll(fixed, []byte("skip=$1"))
	return slices.Concat(fixed, file[end:]), nil
}
