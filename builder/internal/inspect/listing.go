package inspect

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/prebake/prebake/builder/internal/doctor"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Maximum numbers of names and versions in one finding.
const (
	maxNames    = 200
	maxVersions = 8
)

// some returns at most limit names, and says how many are left out. The names come from a bucket or an archive, so some
// quotes a name with an unprintable character.
func some(names []string, limit int) string {
	if len(names) == 0 {
		return "none"
	}
	var out []string
	for _, name := range names[:min(len(names), limit)] {
		if strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
			name = strconv.Quote(name)
		}
		out = append(out, name)
	}
	if more := len(names) - limit; more > 0 {
		out = append(out, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(out, ", ")
}

// ofDrivers matches the objects of single drivers that a build may read, by their names in the folder of a COS build.
var ofDrivers = regexp.MustCompile(
	`^(?:gpu_(?:default|latest|R[0-9]{3,4})_version|nvidia-drivers-(.+)\.tgz|` +
		`extensions/gpu/(?:nvidia-drivers-.+-signature|.+\.signature)\.tar\.gz)$`)

// listing reports the names of all objects below the folder of the COS build. It returns the names of the objects of
// this board, in the current layout and without the folder, or nil if the bucket cannot be listed.
func (l *inspection) listing(ctx context.Context) (own []string) {
	folder := l.kernel.BuildID + "/"
	all, err := l.bucket.List(ctx, folder)
	switch {
	case fault.Is(err, fault.Unsupported):
		l.note("listing", "it is unknown what else the bucket has, because the bucket cannot be listed: %v", err)
		l.note("signed", "it is unknown which drivers Google signed, because the bucket cannot be listed")
		return nil
	case err != nil:
		l.fail("listing", doctor.Warn, err)
		return nil
	case len(all) == 0:
		l.note("listing", "the bucket has no object below %s", l.bucket.URL(l.kernel.BuildID))
	default:
		own = l.listed(folder, all)
	}
	google := slices.DeleteFunc(slices.Clone(own), func(name string) bool {
		return !strings.HasPrefix(name, "extensions/gpu/") && !strings.HasPrefix(name, "nvidia-drivers-") || isSum(name)
	})
	if len(google) == 0 {
		l.note("signed", "Google compiled or signed no driver for this COS build")
	} else {
		l.ok("signed", "%s", some(google, maxNames))
	}
	return own
}

// isSum reports whether a name is the name of a checksum file.
func isSum(name string) bool {
	return strings.HasSuffix(name, ".md5") || strings.HasSuffix(name, ".sha256")
}

// listed reports the objects of this board, those that no build reads, and the folders of other boards.
func (l *inspection) listed(folder string, all []string) (own []string) {
	read := map[string]bool{}
	names, _ := l.readObjects()
	for _, name := range names {
		read[path.Base(name)] = true
	}
	sums, others := map[string][]string{}, map[string]int{}
	var unread []string
	for _, full := range all {
		name := strings.TrimPrefix(full, folder)
		first, rest, deeper := strings.Cut(name, "/")
		switch {
		case deeper && first == l.kernel.Board:
			name = rest
		case slices.ContainsFunc(cosbucket.Layouts(l.kernel, path.Join(folder, l.kernel.Board, name)),
			func(at string) bool { return at == full }) && (!deeper || first == "extensions"):
			// This is the former layout, without a folder for the board.
		default:
			others[first]++
			continue
		}
		if base, ok := strings.CutSuffix(name, path.Ext(name)); ok && isSum(name) {
			sums[base] = append(sums[base], path.Ext(name)[1:])
			continue
		}
		own = append(own, name)
		if !read[name] && !ofDrivers.MatchString(name) {
			unread = append(unread, name)
		}
	}
	slices.Sort(own)
	own = slices.Compact(own)
	var shown []string
	for _, name := range own {
		if with := sums[name]; len(with) > 0 {
			name += " (" + strings.Join(slices.Compact(with), ", ") + ")"
		}
		shown = append(shown, name)
	}
	l.ok("listing", "%d objects of board %s below %s: %s", len(own), l.kernel.Board, l.bucket.URL(l.kernel.BuildID),
		some(shown, maxNames))
	if len(unread) > 0 {
		l.note("not read", "no build reads these objects: %s", some(unread, maxNames))
	}
	var rest []string
	for _, name := range slices.Sorted(maps.Keys(others)) {
		rest = append(rest, fmt.Sprintf("%s (%d)", name, others[name]))
	}
	if len(rest) > 0 {
		l.note("not read", "beside the board's folder, with numbers of objects: %s", some(rest, maxNames))
	}
	return own
}

// drivers reports the drivers that COS lists for the COS build. It returns the versions that nodes ask for by a word:
// default, latest and branches.
func (l *inspection) drivers(ctx context.Context) (wanted []string) {
	list, err := l.bucket.Drivers(ctx, l.kernel)
	if err != nil {
		l.fail("drivers", doctor.Warn, err)
		return nil
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
	newest := slices.SortedFunc(maps.Values(list.Newest()), func(a, b string) int { return target.CompareVersions(b, a) })
	for _, version := range append([]string{list.Default, list.Latest}, newest...) {
		if version != "" && !slices.Contains(wanted, version) {
			wanted = append(wanted, version)
		}
	}
	return wanted[:min(len(wanted), maxVersions)]
}

// runfiles reports where the driver bucket has the runfiles of these versions. A build needs a runfile and its SHA-256.
func (l *inspection) runfiles(ctx context.Context, mirror string, versions []string) (err error) {
	b, err := cosbucket.Open(ctx, mirror)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	if len(versions) == 0 {
		l.note("runfiles", "not looked up, because no version is known; the driver bucket is %s", b.URL(""))
	}
	missing := false
	for _, version := range versions {
		err := l.runfile(ctx, b, version)
		if err != nil {
			l.fail("runfile", doctor.Warn, fmt.Errorf("find the runfile of driver %s: %w", version, err))
		}
		missing = missing || fault.Is(err, fault.InputMissing)
	}
	if missing {
		l.offered(ctx, b)
	}
	return nil
}

// runfile reports where the driver bucket has one runfile.
func (l *inspection) runfile(ctx context.Context, b *cosbucket.Bucket, version string) error {
	var sums, files []string
	for _, place := range cosbucket.RunfileLocations(version, l.kernel.Arch) {
		sums, files = append(sums, place.Sum), append(files, place.Runfile)
	}
	file, size, err := find(ctx, b, files...)
	if fault.Is(err, fault.InputMissing) {
		return fmt.Errorf("the runfile is not at %s, nor at %d other places where a build looks: %w", b.URL(files[0]),
			len(files)-1, err)
	} else if err != nil {
		return err
	}
	sum, _, err := find(ctx, b, sums...)
	if err != nil {
		return fmt.Errorf("the runfile is %s, but no build uses a runfile without its SHA-256: %w", b.URL(file), err)
	}
	l.ok("runfile", "%s, %s; SHA-256 in %s", b.URL(file), bytes(size), sum)
	return nil
}

// offered reports a few names of the driver bucket, so that a reader sees how the bucket names its runfiles.
func (l *inspection) offered(ctx context.Context, b *cosbucket.Bucket) {
	names, err := b.List(ctx, "")
	if err != nil {
		l.note("runfiles", "it is unknown what the driver bucket has: %v", err)
		return
	}
	var known, others []string
	for _, name := range names {
		if _, _, ok := cosbucket.ParseRunfile(name); ok {
			known = append(known, name)
		} else if strings.HasSuffix(name, ".run") {
			others = append(others, name)
		}
	}
	slices.Reverse(known) // the names of newer versions sort last
	l.note("runfiles", "the driver bucket has %d objects; runfiles where a build looks: %s; other names in .run: %s",
		len(names), some(known, maxVersions), some(others, maxVersions))
}
