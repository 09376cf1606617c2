package mirror

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
)

// clangConfig is the configuration of the clang-built kernel.
//
//go:embed clang.config
var clangConfig string

// Paths in the sandbox in which the kernel is compiled. builder/internal/compile uses the same paths.
const (
	clangSource    = "/prebake/kernel"
	clangToolchain = "/prebake/toolchain"
)

// errNotCompiled means that the cache has no clang-built kernel of this version, and Config.ClangCached is set.
var errNotCompiled = errors.New("no earlier run compiled this kernel with clang")

// clangCert is the path of the trusted certificate in the kernel's source.
const clangCert = "certs/test-module-signing.crt"

// Names in the archive in which a finished kernel is cached. clangTestModule is an unsigned module, with which tests
// check what the kernel refuses.
const (
	clangHeaders    = "headers"
	clangImage      = "boot/vmlinuz"
	clangTestModule = "boot/modules/test_module.ko"
)

// sourceLimits are the limits for unpacking a kernel's source archive: twice the size of the source of 6.12.
var sourceLimits = archive.Options{Entries: 250_000, Bytes: 4 << 30}

// configText returns the wanted configuration.
func configText() string {
	return clangConfig + "CONFIG_SYSTEM_TRUSTED_KEYS=\"" + clangCert + "\"\n"
}

// makeClangKernel compiles the kernel, unless the cache has it for this source, compiler, configuration and
// certificate.
func (m *maker) makeClangKernel(ctx context.Context, b clangBuild, toolchain *toolchainFolder) (object, error) {
	sum := func(text []byte) string {
		s := sha256.Sum256(text)
		return hex.EncodeToString(s[:])
	}
	r := recipe{
		Kind: "clang-kernel.tgz", Packages: append([]pkg{b.source}, b.toolchain...),
		Params: []string{"config " + sum([]byte(configText())), "certificate " + sum(b.pair.cert)},
	}
	return m.object(ctx, "clang-built kernel "+b.release, r, func(ctx context.Context, w io.Writer) error {
		if m.ClangCached {
			return fault.Wrap(fault.InputMissing, fmt.Errorf("find kernel %s: %w", b.release, errNotCompiled),
				"compile the kernel, which takes a quarter of an hour or more: make clang")
		}
		tools, err := toolchain.dir(ctx, m.Cache)
		if err != nil {
			return err
		}
		return m.inWorkDir(func(dir string) error {
			m.Progress("compiling " + b.release + " with clang: this takes minutes, once")
			src, err := m.unpackSource(ctx, b.source, dir)
			if err != nil {
				return err
			}
			k := kernelBuild{src: src, toolchain: tools, progress: m.Progress}
			if err := k.configure(ctx, b.pair.cert); err != nil {
				return err
			}
			if err := k.make(ctx, "bzImage", "modules"); err != nil {
				return err
			}
			t, err := builtTree(src, b.release)
			if err != nil {
				return err
			}
			return t.writeTgz(w, "", epoch)
		})
	})
}

// unpackSource unpacks the kernel's source below dir, and returns its folder.
func (m *maker) unpackSource(ctx context.Context, p pkg, dir string) (string, error) {
	deb, err := m.apt.mustFile(p)
	if err != nil {
		return "", err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	limits := sourceLimits
	if limits.XZTool, err = exec.LookPath("xz"); err != nil {
		return "", err
	}
	inner := p.Name + ".tar.xz"
	found := false
	err = pipe(exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb), func(r io.Reader) error {
		for tr := tar.NewReader(r); ; {
			hdr, err := tr.Next()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			if path.Base(hdr.Name) == inner && hdr.Typeflag == tar.TypeReg {
				found = true
				if _, err := archive.Unpack(ctx, tr, root, limits); err != nil {
					return err
				}
			}
		}
	})
	if err != nil {
		return "", fmt.Errorf("unpack %s: %w", filepath.Base(deb), err)
	}
	src := filepath.Join(dir, p.Name)
	if _, err := os.Stat(filepath.Join(src, "Makefile")); err != nil || !found {
		return "", fault.New(fault.InputMissing, fmt.Sprintf("unpack %s: the package has no file %s/Makefile",
			filepath.Base(deb), p.Name),
			"")
	}
	return src, nil
}

// kernelBuild is one source tree that is being compiled.
type kernelBuild struct {
	src, toolchain string
	progress       func(string)
}

// kernelVariables returns variables for the program make. The variables name each compiler, linker and binary tool of
// the toolchain archive, so that make does not use those of the machine. LOCALVERSION adds a + to the release, as in
// COS's kernels.
func kernelVariables() []string {
	llvm := func(name string) string { return "llvm-" + name }
	return []string{
		"ARCH=x86_64", "LOCALVERSION=+", "LLVM=1", "LLVM_IAS=1",
		"CC=" + prefix + "clang", "LD=" + prefix + "ld.lld",
		"AR=" + llvm("ar"), "NM=" + llvm("nm"), "OBJCOPY=" + llvm("objcopy"), "OBJDUMP=" + llvm("objdump"),
		"READELF=" + llvm("readelf"), "STRIP=" + llvm("strip"),
		"HOSTCC=" + hostPrefix + "clang", "HOSTCXX=" + hostPrefix + "clang++", "HOSTLD=" + hostPrefix + "ld.lld",
		"HOSTAR=" + llvm("ar"),
		"HOSTLDFLAGS=-fuse-ld=lld",
	}
}

// make runs the kernel's makefile in a sandbox.
func (k kernelBuild) make(ctx context.Context, targets ...string) error {
	out := &buildOutput{progress: k.progress}
	argv := append([]string{"make", "-j" + strconv.Itoa(runtime.NumCPU())}, kernelVariables()...)
	err := sandbox.Run(ctx, sandbox.Config{
		Argv: append(argv, targets...), Dir: clangSource, Output: out,
		Env: map[string]string{
			"PATH": clangToolchain + "/bin:/usr/bin:/bin", "HOME": "/nonexistent", "LC_ALL": "C", "TZ": "UTC",
			"SOURCE_DATE_EPOCH": "0",
			"KBUILD_BUILD_USER": "builder", "KBUILD_BUILD_HOST": "mirror", "KBUILD_BUILD_VERSION": "1",
			"KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
		},
		Binds: []sandbox.Bind{
			{Host: k.toolchain, Inside: clangToolchain},
			{Host: k.src, Inside: clangSource, Writable: true},
		},
	})
	if err != nil {
		return fmt.Errorf("make %s: %w\n%s", strings.Join(targets, " "), err, out.tail())
	}
	return nil
}

// configure writes .config, and checks that every wanted option has its value. Kconfig drops an option without a
// message if its dependencies are missing.
func (k kernelBuild) configure(ctx context.Context, cert []byte) error {
	root, err := os.OpenRoot(k.src)
	if err != nil {
		return err
	}
	defer root.Close()
	want := configText()
	for name, text := range map[string][]byte{clangCert: cert, "prebake.config": []byte(want)} {
		if err := root.WriteFile(name, text, 0o644); err != nil {
			return err
		}
	}
	if err := k.make(ctx, "KCONFIG_ALLCONFIG=prebake.config", "allnoconfig"); err != nil {
		return err
	}
	got, err := root.ReadFile(".config")
	if err != nil {
		return err
	}
	if missing := missingLines(want, string(got)); len(missing) > 0 {
		return fault.New(fault.Unsupported, "configure kernel: these lines are missing in the final .config: "+
			strings.Join(missing, ", "), "correct deploy/internal/mirror/clang.config for this kernel's source")
	}
	return nil
}

// missingLines returns the lines of a wanted configuration that the final configuration does not have.
func missingLines(want, got string) []string {
	set := map[string]string{}
	for line := range strings.Lines(got) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(name, "#") {
			set[name] = value
		}
	}
	var missing []string
	for line := range strings.Lines(want) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutSuffix(strings.TrimPrefix(line, "# "), " is not set"); ok &&
			strings.HasPrefix(line, "# CONFIG_") {
			if _, there := set[name]; there {
				missing = append(missing, line)
			}
			continue
		}
		if name, value, ok := strings.Cut(line, "="); ok && !strings.HasPrefix(line, "#") && set[name] != value {
			missing = append(missing, line)
		}
	}
	return missing
}

// builtTree returns three parts of a compiled source tree: the headers for compiling modules, the image to boot, and
// the test module.
func builtTree(src, release string) (tree, error) {
	text, err := os.ReadFile(filepath.Join(src, "include/config/kernel.release"))
	if err != nil {
		return nil, err
	}
	if got := strings.TrimSpace(string(text)); got != release {
		return nil, fault.New(fault.Internal,
			fmt.Sprintf("compile kernel: the kernel's release is %q; want %q", got, release), "")
	}
	t := tree{}
	err = filepath.WalkDir(src, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(src, file)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name != "." && !headerFolder(name) {
				return filepath.SkipDir
			}
			return nil
		}
		if !headerFile(name) {
			return nil
		}
		return t.addDisk(clangHeaders+"/"+name, file, d)
	})
	if err != nil {
		return nil, err
	}
	for _, must := range []string{"Makefile", ".config", "Module.symvers", "include/generated/autoconf.h",
		"scripts/mod/modpost", "scripts/module.lds", "tools/objtool/objtool"} {
		if _, ok := t[clangHeaders+"/"+must]; !ok {
			return nil, fault.New(fault.Internal, "compile kernel: make ended without an error, but did not write "+must, "")
		}
	}
	for name, built := range map[string]string{clangImage: "arch/x86/boot/bzImage",
		clangTestModule: "lib/test_module.ko"} {
		data, err := os.ReadFile(filepath.Join(src, built))
		if err != nil {
			return nil, fmt.Errorf("compile kernel: %w", err)
		}
		t.add(name, node{mode: 0o644, data: data})
	}
	return t, nil
}

// headerFolder reports whether the header tree contains files from a folder of the source tree. The choice follows the
// kernel's own packaging scripts, in the folder scripts/package of its source.
func headerFolder(name string) bool {
	top := []string{"arch", "arch/x86", "tools", "tools/objtool"}
	if slices.Contains(top, name) {
		return true
	}
	for _, whole := range []string{"include", "scripts", "arch/x86/include"} {
		if name == whole || strings.HasPrefix(name, whole+"/") {
			// The folder include-prefixes has links to the device trees of other architectures, so it is left out.
			return name != "scripts/dtc/include-prefixes"
		}
	}
	return false
}

// headerFile reports whether a file belongs to the header tree. The caller has checked its folder.
func headerFile(name string) bool {
	dir, base := path.Dir(name), path.Base(name)
	switch dir {
	case ".":
		return slices.Contains([]string{"Makefile", "Kbuild", "Kconfig", ".config", "Module.symvers"}, base)
	case "arch", "tools":
		return false
	case "arch/x86":
		return strings.HasPrefix(base, "Makefile") || strings.HasPrefix(base, "Kbuild") || strings.HasPrefix(base, "Kconfig")
	case "tools/objtool":
		return base == "objtool"
	}
	// Object files, archives and hidden files are results of the compile. The header tree does not need them.
	return !strings.HasSuffix(base, ".o") && !strings.HasSuffix(base, ".a") && !strings.HasPrefix(base, ".")
}

// addDisk adds a file or link from the disk.
func (t tree) addDisk(name, file string, d fs.DirEntry) error {
	switch d.Type() {
	case 0:
		info, err := d.Info()
		if err != nil {
			return err
		}
		n := node{mode: 0o644}
		if info.Mode()&0o111 != 0 {
			n.mode = 0o755
		}
		if n.data, err = os.ReadFile(file); err != nil {
			return err
		}
		t.add(name, n)
	case fs.ModeSymlink:
		to, err := os.Readlink(file)
		if err != nil {
			return err
		}
		t.add(name, node{link: to})
	default:
		return fmt.Errorf("%s is neither a file nor a link", file)
	}
	return nil
}

// buildOutput keeps the end of make's output, and reports how many objects are compiled.
type buildOutput struct {
	progress func(string)
	last     []byte
	objects  int
}

const (
	outputKept  = 4 << 10 // bytes
	objectsStep = 250     // objects between two lines of progress
)

func (b *buildOutput) Write(p []byte) (int, error) {
	for range bytes.Count(p, []byte("  CC ")) {
		if b.objects++; b.objects%objectsStep == 0 {
			b.progress(fmt.Sprintf("clang-built kernel: %d objects compiled", b.objects))
		}
	}
	b.last = append(b.last, p...)
	b.last = b.last[max(0, len(b.last)-outputKept):]
	return len(p), nil
}

func (b *buildOutput) tail() string { return strings.TrimSpace(string(b.last)) }
