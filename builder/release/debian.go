package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// debPackage is one Debian package. arch, sum, size and path come from packages.lock.
type debPackage struct {
	arch, sum string // sum is the SHA-256 in hex
	size      int64  // in bytes
	path      string // relative to an archive's base URL

	file          string // path in the cache, after the download
	control       []byte
	name, version string
}

// These constants limit the number of packages in a list, and the size of one package in bytes.
const (
	maxPackages    = 2000
	maxPackageSize = 256 << 20
)

var (
	sumPattern  = regexp.MustCompile(`^[0-9a-f]{64}$`)
	poolPattern = regexp.MustCompile(`^pool/[A-Za-z0-9+._~/%-]+\.deb$`)
)

// readLock reads a list of packages such as packages.lock.
func readLock(file string) ([]debPackage, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var all []debPackage
	scan := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; scan.Scan(); n++ {
		if strings.HasPrefix(scan.Text(), "#") {
			continue
		}
		f := strings.Fields(scan.Text())
		p := debPackage{}
		if len(f) == 4 {
			p.arch, p.sum, p.path = f[0], f[1], f[3]
			p.size, err = strconv.ParseInt(f[2], 10, 64)
		}
		if len(f) != 4 || err != nil || p.size <= 0 || p.size > maxPackageSize || !sumPattern.MatchString(p.sum) ||
			!poolPattern.MatchString(p.path) || !filepath.IsLocal(p.path) || len(all) == maxPackages {
			text := fmt.Sprintf("read %s: line %d: want architecture, SHA-256, size and path of a package", file, n)
			return nil, fault.New(fault.Usage, text, "write packages.lock again: make release-packages")
		}
		all = append(all, p)
	}
	return all, scan.Err()
}

// ofArch returns the packages for one architecture, together with those for all architectures.
func ofArch(all []debPackage, arch string) []debPackage {
	return slices.DeleteFunc(slices.Clone(all), func(p debPackage) bool { return p.arch != arch && p.arch != "all" })
}

// aptArchives returns the base URLs of Debian's archives that this machine's apt is configured with.
func aptArchives(ctx context.Context) ([]string, error) {
	out, err := output(ctx, "", nil, "apt-get", "indextargets", "--format", "$(REPO_URI)",
		"Created-By: Packages", "Origin: Debian", "Component: main")
	if err != nil {
		return nil, err
	}
	all := strings.Fields(string(out))
	slices.Sort(all)
	if all = slices.Compact(all); len(all) == 0 {
		return nil, fault.New(fault.InputMissing, "find Debian packages: apt has no package index of Debian",
			"give an archive with -archive URL, or run: apt-get update")
	}
	return all, nil
}

// fetch puts every package into the cache, compares its checksum, and reads its control file.
func (c *config) fetch(ctx context.Context, all []debPackage) error {
	if err := os.MkdirAll(c.cache, 0o755); err != nil {
		return err
	}
	var missing []int
	for i := range all {
		all[i].file = filepath.Join(c.cache, all[i].sum+".deb")
		if checkFileSum(all[i].file, all[i].sum) != nil {
			missing = append(missing, i)
		}
	}
	archives := c.archives
	if len(missing) > 0 && len(archives) == 0 {
		var err error
		if archives, err = aptArchives(ctx); err != nil {
			return err
		}
	}
	for _, base := range archives {
		if len(missing) == 0 {
			break
		}
		c.say("downloading %d Debian packages", len(missing))
		var err error
		if missing, err = download(ctx, base, all, missing); err != nil {
			return err
		}
	}
	if len(missing) > 0 {
		first := all[missing[0]].path
		text := fmt.Sprintf(
			"download %s: no archive has this package with the SHA-256 in packages.lock; %d packages are missing",
			first, len(missing))
		return fault.New(fault.InputMissing, text, "give an archive that keeps old versions with -archive URL, or write "+
			"packages.lock again with present versions: make release-packages")
	}
	for i := range all {
		if err := all[i].readControl(ctx); err != nil {
			return fmt.Errorf("read %s: %w", all[i].path, err)
		}
	}
	return nil
}

// download fetches the packages with the given indexes from one archive, with apt's own client. It returns the indexes
// of packages that the archive does not have with the right SHA-256.
func download(ctx context.Context, base string, all []debPackage, indexes []int) (failed []int, err error) {
	for batch := range slices.Chunk(indexes, 32) {
		args := []string{"-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "download-file"}
		for _, i := range batch {
			if info, err := os.Stat(base); err == nil && info.IsDir() {
				err := copyFile(filepath.Join(base, all[i].path), all[i].file+".part")
				if err != nil && !errors.Is(err, os.ErrNotExist) {
					return nil, err
				}
				continue
			}
			url := strings.TrimSuffix(base, "/") + "/" + strings.ReplaceAll(all[i].path, "+", "%2b")
			args = append(args, url, all[i].file+".part", "SHA256:"+all[i].sum)
		}
		if len(args) > 5 {
			// apt-helper fails if one of the packages is missing. Check below which files exist.
			_, _ = output(ctx, "", nil, "/usr/lib/apt/apt-helper", args...)
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
		}
		for _, i := range batch {
			part := all[i].file + ".part"
			if checkFileSum(part, all[i].sum) != nil {
				failed = append(failed, i)
				if err := os.Remove(part); err != nil && !errors.Is(err, os.ErrNotExist) {
					return nil, err
				}
			} else if err := os.Rename(part, all[i].file); err != nil {
				return nil, err
			}
		}
	}
	return failed, nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// checkFileSum returns an error if a file does not have the SHA-256 sum.
func checkFileSum(file, sum string) error {
	got, _, err := fileSum(file)
	if err == nil && got != sum {
		err = fault.New(fault.Unverified, fmt.Sprintf("%s has SHA-256 %s; want %s", file, got, sum), "")
	}
	return err
}

func fileSum(file string) (sum string, size int64, err error) {
	f, err := os.Open(file)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	size, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), size, err
}

func (p *debPackage) readControl(ctx context.Context) (err error) {
	if p.control, err = output(ctx, "", nil, "dpkg-deb", "--field", p.file); err != nil {
		return err
	}
	arch := ""
	for line := range strings.Lines(string(p.control)) {
		if v, ok := strings.CutPrefix(line, "Architecture: "); ok {
			arch = strings.TrimSpace(v)
		}
		if v, ok := strings.CutPrefix(line, "Package: "); ok {
			p.name = strings.TrimSpace(v)
		}
		if v, ok := strings.CutPrefix(line, "Version: "); ok {
			p.version = strings.TrimSpace(v)
		}
	}
	if p.name == "" || p.version == "" {
		return errors.New("the control file lacks the field Package or Version")
	}
	if arch != p.arch {
		return fault.New(fault.Mismatch, fmt.Sprintf("the package is for architecture %.40q; packages.lock says %q", arch,
			p.arch),
			"write packages.lock again: make release-packages")
	}
	return nil
}

// rootFS writes a root file system of Debian packages as a tar. It works for any architecture, because it does not run
// the packages' maintainer scripts. Instead, [rootFS.finish] writes what the scripts would write.
type rootFS struct {
	tw *tar.Writer
	// seen has an entry for each written name. The value is true for a folder.
	seen map[string]bool
	// certificates has the CA certificates, and masters has Debian's templates of passwd and group. Both map a file's path
	// to its content. [rootFS.finish] reads them.
	certificates map[string][]byte
	masters      map[string][]byte
	status       bytes.Buffer
}

// writeRoot writes the root file system of these packages. The same packages give the same bytes.
func writeRoot(ctx context.Context, w io.Writer, arch string, all []debPackage) error {
	r := &rootFS{
		tw: tar.NewWriter(w), seen: map[string]bool{},
		certificates: map[string][]byte{}, masters: map[string][]byte{},
	}
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b debPackage) int { return strings.Compare(a.name, b.name) })
	if err := r.begin(arch); err != nil {
		return err
	}
	for _, p := range all {
		if err := r.unpack(ctx, p); err != nil {
			return fmt.Errorf("unpack %s: %w", p.path, err)
		}
	}
	return errors.Join(r.finish(), r.tw.Close())
}

// usrLinks has, for each architecture, the top-level folders that are links into usr since Debian 12. debootstrap makes
// them.
var usrLinks = map[string][]string{
	"amd64": {"bin", "lib", "lib64", "sbin"},
	"arm64": {"bin", "lib", "sbin"},
}

func (r *rootFS) begin(arch string) error {
	err := r.folder("usr")
	for _, name := range usrLinks[arch] {
		err = errors.Join(err, r.folder("usr/"+name), r.link(name, "usr/"+name))
	}
	return err
}

func (r *rootFS) folder(name string) error {
	if r.seen[name] {
		return nil
	}
	r.seen[name] = true
	return r.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755, ModTime: time.Unix(0, 0)})
}

func (r *rootFS) link(name, to string) error {
	if _, there := r.seen[name]; there {
		return nil
	}
	r.seen[name] = false
	return r.tw.WriteHeader(&tar.Header{
		Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777, ModTime: time.Unix(0, 0),
	})
}

func (r *rootFS) file(name string, text []byte, mode int64) error {
	if _, there := r.seen[name]; there {
		return nil
	}
	r.seen[name] = false
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(text)), ModTime: time.Unix(0, 0)}
	if err := r.tw.WriteHeader(h); err != nil {
		return err
	}
	_, err := r.tw.Write(text)
	return err
}

// rootPath returns the path in the root file system for a file of a package. A file in /bin goes to usr/bin, because
// /bin is a link since Debian 12.
func rootPath(name string) string {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	top, rest, _ := strings.Cut(name, "/")
	switch top {
	case "bin", "lib", "lib32", "lib64", "libx32", "sbin":
		return path.Join("usr", top, rest)
	}
	return name
}

// isOmitted reports whether a file is documentation that the image omits. Licences are not omitted.
func isOmitted(name string) bool {
	if rest, ok := strings.CutPrefix(name, "usr/share/doc/"); ok {
		return strings.Contains(rest, "/") && path.Base(rest) != "copyright"
	}
	for _, folder := range []string{"man", "info", "locale", "lintian"} {
		if strings.HasPrefix(name, "usr/share/"+folder+"/") {
			return true
		}
	}
	return false
}

func (r *rootFS) unpack(ctx context.Context, p debPackage) (err error) {
	fmt.Fprintf(&r.status, "%sStatus: install ok installed\n\n", withNewline(p.control))
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", p.file)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = r.copyAll(tar.NewReader(pipe))
	if err == nil {
		_, err = io.Copy(io.Discard, pipe) // the padding at the end of the archive
	}
	if err != nil {
		err = errors.Join(err, cmd.Process.Kill())
	}
	if wait := cmd.Wait(); wait != nil {
		err = errors.Join(err, fmt.Errorf("dpkg-deb: %w: %s", wait, stderr.Bytes()))
	}
	return err
}

func (r *rootFS) copyAll(tr *tar.Reader) error {
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := r.copy(h, tr); err != nil {
			return fmt.Errorf("copy the file %.200q: %w", h.Name, err)
		}
	}
}

func (r *rootFS) copy(h *tar.Header, content io.Reader) error {
	name := rootPath(h.Name)
	folder, there := r.seen[name]
	switch {
	case name == "" || isOmitted(name) || h.Typeflag == tar.TypeDir && folder:
		return nil
	case there:
		return errors.New("another package has a file with this name")
	}
	// The new header has no capabilities, no setuid and no setgid bit, so no file makes its user root.
	h = &tar.Header{
		Typeflag: h.Typeflag, Name: name, Linkname: h.Linkname, Size: h.Size, Mode: h.Mode & 0o1777,
		Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime,
	}
	switch h.Typeflag {
	case tar.TypeDir:
		h.Name += "/"
	case tar.TypeLink:
		h.Linkname = rootPath(h.Linkname)
		if _, ok := r.seen[h.Linkname]; !ok {
			return fmt.Errorf("the hard link leads to %.200q, which no earlier entry has", h.Linkname)
		}
	case tar.TypeReg, tar.TypeSymlink:
	default:
		return fmt.Errorf("the entry has type %q; want a file, a folder or a link", h.Typeflag)
	}
	r.seen[name] = h.Typeflag == tar.TypeDir
	if err := r.tw.WriteHeader(h); err != nil {
		return err
	}
	var keep bytes.Buffer
	keeper := r.keeper(name)
	if h.Typeflag == tar.TypeReg && keeper != nil {
		content = io.TeeReader(content, &keep)
	}
	if _, err := io.Copy(r.tw, content); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeReg && keeper != nil {
		keeper[name] = keep.Bytes()
	}
	return nil
}
