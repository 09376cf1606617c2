package mirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Debian's -source packages contain Debian's patches, which real runfiles lack. The mirror undoes them with NVIDIA's
// own release tree, from Debian's source package of the open flavour.
const (
	openOrigin = "nvidia-open-gpu-kernel-modules"
	// undoRecipe is the version of the code that undoes the patches, a part of a runfile's recipe. Change it whenever the
	// code gives another result.
	undoRecipe = "undo-1"
)

// edition has one folder of module sources twice: as NVIDIA publishes it, and with Debian's edits.
type edition struct{ own, debian tree }

// addDebSrc adds entries for source packages to the result of [DeriveSources]. The entries are only for the given suite
// and for contrib, which has the only source package that the mirror needs.
func addDebSrc(derived []byte, codename string) []byte {
	out := bytes.NewBuffer(bytes.Clone(derived))
	for _, s := range parseDeb822(derived) {
		if !slices.Contains(strings.Fields(s.fields["suites"]), codename) {
			continue
		}
		fmt.Fprintf(out, "\nTypes: deb-src\nURIs: %s\nSuites: %s\nComponents: contrib\n", s.fields["uris"], codename)
		for _, keep := range []struct{ field, name string }{{"signed-by", "Signed-By"}, {"trusted", "Trusted"},
			{"check-valid-until", "Check-Valid-Until"}} {
			if v := s.fields[keep.field]; v != "" {
				fmt.Fprintf(out, "%s: %s\n", keep.name, v)
			}
		}
	}
	return out.Bytes()
}

// errNoOrigin means that Debian's archive does not serve NVIDIA's own tree.
var errNoOrigin = errors.New("the archive of Debian does not serve NVIDIA's own sources")

// origin returns the path of NVIDIA's own release archive of the open flavour. It downloads a missing file.
func (a *apt) origin(ctx context.Context, version string) (file string, err error) {
	file = filepath.Join(a.dir, "packages", openOrigin+"_"+pkg{Version: version}.upstream()+".orig.tar.xz")
	if info, err := os.Stat(file); err == nil && info.Size() > 0 {
		return file, nil
	}
	tmp, err := os.MkdirTemp(a.dir, "download-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	if _, err := a.run(ctx, tmp, "apt-get", "source", "-qq", "--tar-only", "--download-only",
		openOrigin+"="+version); err != nil {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		return "", fmt.Errorf("%w: %s", errNoOrigin, firstLine(err))
	}
	return file, os.Rename(filepath.Join(tmp, filepath.Base(file)), file)
}

// openTree returns the folder kernel-open/ of NVIDIA's own release.
func openTree(ctx context.Context, file string) (tree, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	t := tree{}
	err = readXZ(ctx, t, data, func(name string) string {
		_, inside, _ := strings.Cut(name, "/")
		rest, ok := strings.CutPrefix(inside, "kernel-open/")
		if !ok || path.Base(rest) == ".gitignore" {
			return ""
		}
		return rest
	})
	if err == nil && t["Kbuild"].data == nil {
		err = fault.New(fault.InputMissing, "read "+filepath.Base(file)+": the archive has no file kernel-open/Kbuild", "")
	}
	return t, err
}

// sub returns the part of the tree below a folder.
func (t tree) sub(dir string) tree {
	below := tree{}
	for name, n := range t {
		if rest, ok := strings.CutPrefix(name, dir+"/"); ok {
			below[rest] = n
		}
	}
	return below
}

// replace replaces the content of a folder with another tree.
func (t tree) replace(dir string, with tree) {
	for name := range t.sub(dir) {
		delete(t, dir+"/"+name)
	}
	for name, n := range with {
		t[dir+"/"+name] = n
	}
}

// editedFiles returns the names of the files that Debian changed: dpkg-source gives them the latest time of all files.
func (t tree) editedFiles() []string {
	var newest int64
	for _, n := range t {
		newest = max(newest, n.changed)
	}
	var names []string
	for name, n := range t {
		if !n.dir && n.changed == newest && path.Ext(name) != ".o_binary" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// undo undoes Debian's edits in a tree of sources. pair is a folder of sources in both editions, maybe of another
// flavour or release. If a changed file equals the file of that name in pair.debian, undo uses the original from
// pair.own. For every other changed file, undo reverses the difference between the two files of pair.
//
// edits has a line for each changed file. undo returns an error if a line that Debian added is still in a file.
func undo(ctx context.Context, work string, debian tree, pair edition) (own tree, edits []string, err error) {
	own = tree{}
	for name, n := range debian {
		own[name] = n
	}
	for _, name := range debian.editedFiles() {
		was, edited := pair.own[name], pair.debian[name]
		// The original cannot be known if an edition lacks the file, or if both are equal.
		if was.data == nil || edited.data == nil || bytes.Equal(was.data, edited.data) {
			return nil, nil, fault.New(fault.Unsupported, "undo Debian's edits: the original of "+name+" is not known", "")
		}
		n := own[name]
		how := "as in NVIDIA's own"
		if bytes.Equal(n.data, edited.data) {
			n.data = was.data
		} else {
			how = "backwards"
			if n.data, err = unpatch(ctx, work, n.data, was.data, edited.data); err != nil {
				return nil, nil, fmt.Errorf("undo Debian's edits of %s: %w", name, err)
			}
		}
		if left := remainingLines(n.data, was.data, edited.data); len(left) > 0 {
			return nil, nil, fault.New(fault.Unsupported,
				fmt.Sprintf("undo Debian's edits of %s: %d lines stay, the first is %.80q", name, len(left), left[0]), "")
		}
		own[name] = n
		edits = append(edits, name+": "+how)
	}
	return own, edits, nil
}

// unpatch reverses the difference between was and edited in a text. It skips the parts of the difference that do not
// fit, because Debian's patches differ between flavours.
func unpatch(ctx context.Context, work string, text, was, edited []byte) ([]byte, error) {
	file := func(name string) string { return filepath.Join(work, name) }
	if err := errors.Join(os.WriteFile(file("was"), was, 0o644), os.WriteFile(file("edited"), edited, 0o644)); err != nil {
		return nil, err
	}
	diff := exec.CommandContext(ctx, "diff", "-u", "was", "edited")
	diff.Dir = work
	patch, err := diff.Output()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		return nil, commandError(diff, err, nil)
	}
	var best []byte
	for _, fuzz := range []string{"-F0", "-F3"} {
		if err := os.WriteFile(file("text"), text, 0o644); err != nil {
			return nil, err
		}
		// Without -f, patch would ignore -R if the text does not have a change, and would apply that change.
		cmd := exec.CommandContext(ctx, "patch", "-R", "-f", fuzz, "--no-backup-if-mismatch", "-r", "-", "text")
		cmd.Dir, cmd.Stdin = work, bytes.NewReader(patch)
		out, err := cmd.CombinedOutput()
		if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
			return nil, commandError(cmd, err, out)
		}
		if best, err = os.ReadFile(file("text")); err != nil {
			return nil, err
		}
		if len(remainingLines(best, was, edited)) == 0 {
			break
		}
	}
	return best, nil
}

// remainingLines returns the lines of a text that are in Debian's edition of the file, but not in NVIDIA's own. It
// ignores lines of fewer than 12 bytes, and lines that begin with #e, such as #else and #endif.
func remainingLines(text, was, edited []byte) []string {
	set := func(text []byte) map[string]bool {
		lines := map[string]bool{}
		for line := range strings.Lines(string(text)) {
			lines[strings.TrimSpace(line)] = true
		}
		return lines
	}
	own, now := set(was), set(text)
	var left []string
	for line := range strings.Lines(string(edited)) {
		if line = strings.TrimSpace(line); len(line) >= 12 && !own[line] && now[line] && !strings.HasPrefix(line, "#e") {
			left = append(left, line)
		}
	}
	return left
}

// sources has a release's module sources as NVIDIA publishes them.
type sources struct {
	kernel, open tree // open is nil for a release without the open flavour
	edits        []string
}

// ownSources undoes Debian's edits of a release that has both flavours.
func (m *maker) ownSources(ctx context.Context, r release, t tree) (s sources, err error) {
	file, err := r.apt.origin(ctx, r.sourceVersion())
	if err != nil {
		return s, err
	}
	pair := edition{debian: t.sub("kernel-open")}
	if pair.own, err = openTree(ctx, file); err != nil {
		return s, err
	}
	s.open = pair.own
	for name, n := range pair.debian { // compiled core objects, of which NVIDIA's tree has only the sources
		if path.Ext(name) == ".o_binary" {
			s.open[name] = n
		}
	}
	err = m.inWorkDir(func(dir string) error {
		var err error
		s.kernel, s.edits, err = undo(ctx, dir, t.sub("kernel"), pair)
		return err
	})
	return s, err
}

// likeSources undoes Debian's edits of a release with only one flavour. base is a release of the same branch with both
// flavours. NVIDIA's own sources of base are known, so base shows what Debian edits.
func (m *maker) likeSources(ctx context.Context, base release, t tree) (s sources, err error) {
	only := base
	only.packages = base.onlySources()
	debian, err := debianTree(ctx, m.platform, only)
	if err != nil {
		return s, err
	}
	own, err := m.ownSources(ctx, base, debian)
	if err != nil {
		return s, err
	}
	err = m.inWorkDir(func(dir string) error {
		var err error
		s.kernel, s.edits, err = undo(ctx, dir, t.sub("kernel"), edition{own: own.kernel, debian: debian.sub("kernel")})
		return err
	})
	return s, err
}
