package mirror

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// gccMajor is the major version of the compiler that Debian 12 builds its kernels with.
const gccMajor = "12"

// prefix begins the names of the tools in COS's SDK. toolchain_env has such names.
const prefix = "x86_64-cros-linux-gnu-"

// toolchainEnv is the content of toolchain_env.
const toolchainEnv = "CC=" + prefix + "gcc\nCXX=" + prefix + "gcc\n"

// toolchainPackages contain the compiler, the binary tools, and all their libraries except libc, which comes from the
// machine.
var toolchainPackages = append([]string{
	"gcc-" + gccMajor, "cpp-" + gccMajor, "libgcc-" + gccMajor + "-dev", "binutils-x86-64-linux-gnu",
}, libraryPackages...)

// binaries are the tools of binutils in the archive.
var binaries = []string{"addr2line", "ar", "as", "c++filt", "elfedit", "ld.bfd", "nm", "objcopy", "objdump", "ranlib",
	"readelf", "size", "strings", "strip"}

// machineLibs are the libraries of libc. The toolchain archive does not contain them: like COS's toolchain, it uses the
// machine's.
var machineLibs = []string{"libc.so.6", "libm.so.6", "libdl.so.2", "ld-linux-x86-64.so.2"}

// toolchainTree makes the tree of a compiler that works from any folder.
func toolchainTree(ctx context.Context, a *apt, p platform, pkgs []pkg, work string) (tree, error) {
	t := tree{}
	for _, need := range pkgs {
		file, err := a.mustFile(need)
		if err != nil {
			return nil, err
		}
		if err := readDeb(ctx, t, file, p.toolchainPick); err != nil {
			return nil, err
		}
	}
	t.add("bin/"+p.prefix+"ld", node{link: p.prefix + "ld.bfd"})
	for _, tool := range []string{"ar", "as", "ld", "ld.bfd", "nm", "objcopy", "objdump", "ranlib", "strip"} {
		t.add(p.triplet+"/bin/"+tool, node{link: "../../bin/" + p.prefix + tool})
	}
	if err := t.checkLinks(); err != nil {
		return nil, err
	}
	if err := relocate(ctx, t, work); err != nil {
		return nil, err
	}
	return t, t.checkLibraries()
}

// toolchainPick returns the path in the archive for a file of Debian's packages; "" leaves the file out. It leaves out
// lto1, sanitizers and gcc's plugins. They are two thirds of the packages, and no kernel module needs them.
func (p platform) toolchainPick(name string) string {
	base := path.Base(name)
	if tool, ok := strings.CutPrefix(name, "usr/bin/"+p.triplet+"-"); ok {
		if tool == "gcc-"+gccMajor {
			return "bin/" + p.prefix + "gcc"
		}
		if slices.Contains(binaries, tool) {
			return "bin/" + p.prefix + tool
		}
		return ""
	}
	if rest, ok := strings.CutPrefix(name, "usr/"+p.gccDir+"/"); ok {
		switch {
		case strings.HasPrefix(rest, "include/") && !strings.HasPrefix(rest, "include/sanitizer"),
			rest == "cc1", rest == "collect2", rest == "lto-wrapper", rest == "liblto_plugin.so", rest == "libgcc.a",
			strings.HasPrefix(rest, "crt") && path.Ext(rest) == ".o":
			return p.gccDir + "/" + rest
		}
		return ""
	}
	dir := path.Dir(name)
	if (dir == "usr/lib/x86_64-linux-gnu" || dir == "lib/x86_64-linux-gnu") && strings.Contains(base, ".so") {
		return "lib/" + base
	}
	return ""
}

// checkLinks returns an error if a link leaves the tree, or if its target is missing. The archive must not depend on
// other files.
func (t tree) checkLinks() error {
	for name, n := range t {
		if n.link == "" {
			continue
		}
		to := path.Join(path.Dir(name), n.link)
		if _, ok := t[to]; path.IsAbs(n.link) || !ok {
			return fault.New(fault.Internal, fmt.Sprintf("lay out toolchain: the link %s leads to %s, which the archive lacks",
				name,
				n.link),
				"")
		}
	}
	return nil
}

// relocate makes every program and library search the archive's folder lib first. The search path is relative, so the
// archive works in any folder. work is a scratch folder.
func relocate(ctx context.Context, t tree, work string) error {
	root, err := os.OpenRoot(work)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, name := range t.paths() {
		n := t[name]
		if n.link != "" || !bytes.HasPrefix(n.data, []byte(elf.ELFMAG)) || path.Ext(name) == ".o" {
			continue
		}
		up, err := filepath.Rel(path.Dir(name), "lib")
		if err != nil {
			return err
		}
		file := strings.ReplaceAll(name, "/", "+")
		if err := root.WriteFile(file, n.data, 0o755); err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, "patchelf", "--force-rpath", "--set-rpath", "$ORIGIN/"+up, file)
		cmd.Dir = work
		if _, err := output(cmd); err != nil {
			return fmt.Errorf("relocate %s: %w", name, err)
		}
		if n.data, err = root.ReadFile(file); err != nil {
			return err
		}
		t[name] = n
		if err := root.Remove(file); err != nil {
			return err
		}
	}
	return nil
}

// checkLibraries returns an error if a file in the tree needs a library that is neither in the tree nor in machineLibs.
func (t tree) checkLibraries() error {
	for name, n := range t {
		if !bytes.HasPrefix(n.data, []byte(elf.ELFMAG)) || path.Ext(name) == ".o" {
			continue
		}
		f, err := elf.NewFile(bytes.NewReader(n.data))
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		needed, err := f.ImportedLibraries()
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		for _, lib := range needed {
			if _, ok := t["lib/"+lib]; !ok && !slices.Contains(machineLibs, lib) {
				return fault.New(fault.Internal,
					fmt.Sprintf("lay out toolchain: the file %s needs library %s, which no listed package has", name, lib),
					"add the library's package to libraryPackages or clangPackages in deploy/internal/mirror")
			}
		}
	}
	return nil
}

// xzDefault is the default preset of xz for toolchain archives.
const xzDefault = "-3"

// toolchainRecipe returns the recipe of a toolchain archive. It names the preset of xz only if that is not the default:
// so the keys of older archives in the cache stay as they are.
func (m *maker) toolchainRecipe(ctx context.Context, kind string, pkgs []pkg) (recipe, error) {
	versions, err := toolVersions(ctx, "xz", "patchelf")
	r := recipe{Kind: kind, Packages: pkgs, Tools: versions}
	if m.xzPreset != xzDefault {
		r.Params = []string{m.xzPreset}
	}
	return r, err
}

// writeTarXZ writes the tree as a tar.xz, with a preset of xz. xz compresses in blocks of a fixed size: by default, the
// bytes would depend on the number of processors.
func (t tree) writeTarXZ(ctx context.Context, w io.Writer, preset string) error {
	cmd := exec.CommandContext(ctx, "xz", preset, "-T2", "--block-size=8MiB", "--check=crc64", "-c")
	cmd.Env = append(os.Environ(), "XZ_DEFAULTS=", "XZ_OPT=")
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = w, &stderr
	if err := cmd.Start(); err != nil {
		return commandError(cmd, err, nil)
	}
	packErr := t.writeTar(in, "./", epoch)
	if err := in.Close(); packErr == nil {
		packErr = err
	}
	if err := cmd.Wait(); err != nil {
		return commandError(cmd, err, stderr.Bytes())
	}
	return packErr
}
