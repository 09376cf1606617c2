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

// Debian's -source packages are NVIDIA's trees with Debian's patches, and real
// runfiles have none of them. The source package of the open flavour has NVIDIA's
// own release tree beside; with it the patches are undone.
const (
	openOrigin = "nvidia-open-gpu-kernel-modules"
	// undoRecipe is raised with any change to what comes out of undoing.
	undoRecipe = "undo-1"
)

// edition is one folder of module sources in two editions: NVIDIA's own, and
// Debian's.
type edition struct{ own, debian tree }

// addDebSrc adds to derived sources those of source packages: of this suite and
// of contrib alone, where the one source package is that is wanted.
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

// errNoOrigin says that Debian's archive does not serve NVIDIA's own tree.
var errNoOrigin = errors.New("NVIDIA's own tree is not served")

// origin returns the file with NVIDIA's own release tree of the open flavour.
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

// openTree returns kernel-open/ of NVIDIA's own release.
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
		err = fault.New(fault.InputMissing, "read "+filepath.Base(file)+": no kernel-open/Kbuild in it", "")
	}
	return t, err
}

// sub returns what is below a folder of the tree.
func (t tree) sub(dir string) tree {
	below := tree{}
	for name, n := range t {
		if rest, ok := strings.CutPrefix(name, dir+"/"); ok {
			below[rest] = n
		}
	}
	return below
}

// replace puts a tree in the place of a folder.
func (t tree) replace(dir string, with tree) {
	for name := range t.sub(dir) {
		delete(t, dir+"/"+name)
	}
	for name, n := range with {
		t[dir+"/"+name] = n
	}
}

// edited are the files that Debian changed: dpkg-source gives them the time of the
// newest changelog entry, which is later than all of NVIDIA's.
func (t tree) edited() []string {
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

// undo returns Debian's edition of some sources as NVIDIA has them. Each file that
// Debian changed is changed back as the pair of editions says, which may be of
// another flavour or release: a file that is equal in Debian's editions gives way
// to NVIDIA's own, any other gets the difference backwards. edits tells, a line
// for each file. A file from which not all of Debian's lines are gone is an error.
func undo(ctx context.Context, work string, debian tree, pair edition) (own tree, edits []string, err error) {
	own = tree{}
	for name, n := range debian {
		own[name] = n
	}
	for _, name := range debian.edited() {
		was, edited := pair.own[name], pair.debian[name]
		// Where the pair's editions are equal, it was edited in this release alone.
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

// unpatch applies the difference between two texts backwards to a third one. What
// does not fit is left out: Debian's patches differ between flavours.
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
		// Without -f, patch ignores -R where the text lacks the change, and applies it.
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

// remainingLines are the lines that only Debian's edition has and that are still there.
// Short ones, and the ends of conditions, are no evidence.
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

// sources are a release's module sources as NVIDIA has them.
type sources struct {
	kernel, open tree // open is nil for a release without it
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
	for name, n := range pair.debian { // the linked cores, which NVIDIA's tree only has the sources of
		if path.Ext(name) == ".o_binary" {
			s.open[name] = n
		}
	}
	err = m.work(func(dir string) error {
		var err error
		s.kernel, s.edits, err = undo(ctx, dir, t.sub("kernel"), pair)
		return err
	})
	return s, err
}

// likeSources undoes the edits of another release of the branch, as they were
// undone in the release that has both flavours.
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
	err = m.work(func(dir string) error {
		var err error
		s.kernel, s.edits, err = undo(ctx, dir, t.sub("kernel"), edition{own: own.kernel, debian: debian.sub("kernel")})
		return err
	})
	return s, err
}
