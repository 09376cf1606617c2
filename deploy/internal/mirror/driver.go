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
)

// runfileTree returns the files of a release in the layout of NVIDIA's runfile. It also returns a list of Debian's
// edits that it undid.
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

// makeOwn replaces Debian's edition of the module sources with NVIDIA's own. It returns a list of Debian's edits that
// it undid. If NVIDIA's sources are not available, Debian's edition stays, and the list says so.
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
		// apt's message depends on this machine's archive. It is left out, because the mirror must be the same on every
		// machine.
		m.Progress(fmt.Sprintf("driver %s stays as Debian edited it: %v", r.version, err))
		return []string{debianEdition + errNoOrigin.Error()}, nil
	case fault.Is(err, fault.Unsupported):
		m.Progress(fmt.Sprintf("driver %s stays as Debian edited it: %v", r.version, err))
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

// debianEdition begins the list of edits if a release keeps Debian's sources.
const debianEdition = "Debian's edition: "

// debianTree makes a tree from the packages of a release.
func debianTree(ctx context.Context, p platform, r release) (tree, error) {
	t := tree{}
	for _, need := range r.packages {
		file, err := r.apt.mustFile(need)
		if err != nil {
			return nil, err
		}
		switch strings.TrimSuffix(need.Name, p.foreign) {
		case r.line.packageName(sourcePackage):
			err = addSource(ctx, t, file, r.line.packageName("nvidia-kernel"), "kernel")
		case r.line.packageName(openSourcePackage):
			err = addSource(ctx, t, file, r.line.packageName("nvidia-open-kernel"), "kernel-open")
		default:
			err = readDeb(ctx, t, file, func(name string) string { return p.runfileName(name, r.version) })
		}
		if err != nil {
			return nil, err
		}
	}
	return t, nil
}

// finish completes the tree: it adds the links of the libraries, nvidia-installer and .manifest, removes manual pages,
// and sets modes. finish returns an error if a file is missing that every runfile has.
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
	for _, must := range []string{"kernel/Makefile", "kernel/conftest.sh", "kernel/nvidia/nv-kernel.o_binary",
		"nvidia-smi", "LICENSE", "libcuda.so." + r.version, "libnvidia-ml.so." + r.version} {
		if _, ok := t[must]; !ok {
			return fault.New(fault.InputMissing, fmt.Sprintf("lay out driver %s: Debian's packages have no file %s", r.version,
				must),
				"")
		}
	}
	t.add("nvidia-installer", node{mode: 0o755, data: []byte(installer)})
	t.addFile(".manifest", manifest(t, p.runfile, r.version))
	return nil
}

// addSource adds the module sources and NVIDIA's licence from one of Debian's -source packages. From the package's
// README, it makes the list of supported GPUs.
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
	move := pickFolder(prefix, to)
	return readXZ(ctx, t, outer["source"].data, func(name string) string {
		// Leave out what Debian adds to NVIDIA's files.
		if name == prefix+"/debian" || strings.HasPrefix(name, prefix+"/debian/") || name == prefix+"/NVIDIA_Changelog" {
			return ""
		}
		return move(name)
	})
}

// runfileName maps a path in Debian's package to the name in NVIDIA's runfile; "" leaves the file out.
func (p platform) runfileName(name, version string) string {
	dir, base := path.Dir(name), path.Base(name)
	switch {
	case strings.HasPrefix(name, "lib/firmware/nvidia/"+version+"/"),
		strings.HasPrefix(name, "usr/lib/firmware/nvidia/"+version+"/"):
		return "firmware/" + base
	case (dir == "usr/bin" || dir == "usr/sbin") && strings.HasPrefix(base, "nvidia-"),
		path.Dir(dir) == "usr/lib/nvidia" && strings.HasPrefix(base, "nvidia-"):
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

// fixHeader makes makeself's header look like the header of NVIDIA's runfiles. It also sets the uncompressed size to
// the sum of the file sizes: makeself asks du, whose result depends on the file system. The payload, the number of
// lines and all checksums stay the same.
func fixHeader(file []byte, t tree) ([]byte, error) {
	end := bytes.Index(file, headerEnds)
	if end < 0 {
		return nil, fault.New(fault.Internal, "read the header of makeself: the last line is not at the expected place",
			"report this and the output of makeself --version to the developers of Prebake")
	}
	head := file[:end]
	m := usizeLine.FindSubmatch(head)
	if m == nil {
		return nil, fault.New(fault.Internal, "read the header of makeself: the header has no uncompressed size",
			"report this and the output of makeself --version to the developers of Prebake")
	}
	var total int64
	for _, n := range t {
		total += int64(len(n.data))
	}
	size := regexp.MustCompile(`\b` + string(m[1]) + `( KB|; then)`)
	fixed := size.ReplaceAll(head, fmt.Appendf(nil, "%d$1", (total+1023)/1024))
	// NVIDIA's header has the option -x, with which callers unpack the runfile. It has the line skip=NUMBER without quotes
	// around the number. makeself has no -x, and writes the quotes.
	if len(optionLine.FindAll(fixed, -1)) != 1 || !skipLine.Match(fixed) {
		return nil, fault.New(fault.Internal, "read the header of makeself: the header has no option --noexec, or no line "+
			"skip=",
			"report this and the output of makeself --version to the developers of Prebake")
	}
	fixed = optionLine.ReplaceAll(fixed, []byte("$1|-x|--extract-only)"))
	fixed = skipLine.ReplaceAll(fixed, []byte("skip=$1"))
	return slices.Concat(fixed, file[end:]), nil
}
