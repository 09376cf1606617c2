package compile

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Paths inside the sandbox. They end up in debug information and in the build
// ids that a linker computes over it: to change one changes every module.
const (
	insideToolchain = "/prebake/toolchain"
	insideKernel    = "/prebake/kernel"
	insideSource    = "/prebake/src"
	insideOut       = "/prebake/out"
)

// kernelArch is Kbuild's term for an architecture, as `uname -m` of the target
// prints it; NVIDIA's makefiles map x86_64 to x86 themselves.
var kernelArch = map[target.Arch]string{target.AMD64: "x86_64", target.ARM64: "arm64"}

// crossPrefix is the name prefix of the tools in COS's toolchain archives.
var crossPrefix = map[target.Arch]string{
	target.AMD64: "x86_64-cros-linux-gnu-",
	target.ARM64: "aarch64-cros-linux-gnu-",
}

// tools is what the toolchain offers and what the kernel's configuration asks for.
type tools struct {
	variables []string // make variables, CC=name and so on
	compiler  string   // path inside the sandbox
	strip     string   // name of the strip program
	objcopy   string   // likewise; "" where the toolchain has none
	sysroot   string   // path inside the sandbox; may be empty
	clang     bool

	modVersions bool // CONFIG_MODVERSIONS of the kernel
	btf         bool // CONFIG_DEBUG_INFO_BTF_MODULES of the kernel
	pahole      int  // CONFIG_PAHOLE_VERSION, as 124; 0 where the kernel does not say
}

// A tool is named, not given as a command line: it is looked up in the
// toolchain's bin folders only.
var toolPattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._+-]{0,63}$`)

// compilerPattern takes a compiler's name apart: the prefix that its companions
// have too, and the version that Debian's names end with.
var compilerPattern = regexp.MustCompile(`^(.*-)?(?:gcc|clang|cc)(-[0-9.]+)?$`)

// hostClang is the compiler of COS's toolchains for programs that run during
// the build.
const hostClang = "x86_64-pc-linux-gnu-clang"

// clangFlags reach conftest too, and are there for its sake: it takes any error
// for an answer. Where a kernel's CONFIG_WERROR reaches it, as in 5.15, clang's
// warning about an undeclared function (gcc has been told to be silent) would
// say that the kernel has that function. Errors that are asked for by name, as
// NVIDIA's own flags do, stay errors. strict-prototypes is such a one of the
// kernel's, and older drivers trip over it in clang's stricter reading; COS's
// own farm drops it too.
var clangFlags = []string{"-Wno-error", "-Wno-error=strict-prototypes"}

// toolchain looks programs up in an unpacked toolchain archive.
type toolchain string

func (t toolchain) has(name string) bool { return t.inside(name) != "" }

// inside returns a program's path in the sandbox, or "" where there is none.
func (t toolchain) inside(name string) string {
	for _, dir := range []string{"bin", "usr/bin"} {
		// Lstat: a link may lead to where only the sandbox has a file.
		if info, err := os.Lstat(filepath.Join(string(t), dir, name)); err == nil && !info.IsDir() {
			return insideToolchain + "/" + dir + "/" + name
		}
	}
	return ""
}

// findTools chooses the compiler and its companions: the compiler by the name
// in toolchain_env, the others by what the kernel's configuration says that it
// was built with. A kernel of clang and lld was built with LLVM=1, and its
// modules are; one of clang and another linker has the binutils of the
// compiler's prefix, as has one of gcc.
func findTools(r Request) (tools, error) {
	var t tools
	text, err := readConfig(filepath.Join(r.Headers, ".config"))
	if err != nil {
		return t, err
	}
	config := parseConfig(text)
	if m := madeBy.FindSubmatch(text); m != nil {
		t.pahole, _ = strconv.Atoi(string(m[1])) // digits, by the pattern
	}
	t.modVersions = config["CONFIG_MODVERSIONS"]
	t.btf = config["CONFIG_DEBUG_INFO_BTF_MODULES"]
	chain := toolchain(r.Toolchain)
	cc, prefix, suffix, err := findCompiler(r, config, chain)
	if err != nil {
		return t, err
	}
	t.clang = strings.Contains(cc, "clang")
	t.variables = []string{"CC=" + cc}
	t.compiler = chain.inside(cc)
	llvm := t.clang && config["CONFIG_LD_IS_LLD"]
	t.variables = append(t.variables, clangVariables(config, chain, t.clang, llvm, prefix)...)
	for _, row := range companions(config, llvm, prefix, suffix) {
		if named := r.Env[row.variable]; toolPattern.MatchString(named) {
			row.candidates = append([]string{named}, row.candidates...)
		}
		// One that is missing keeps its name: a build that needs it then fails
		// over that name, instead of taking the host's tool unseen.
		name := row.candidates[0]
		if i := slices.IndexFunc(row.candidates, chain.has); i >= 0 {
			name = row.candidates[i]
			switch row.variable {
			case "STRIP":
				t.strip = name
			case "OBJCOPY":
				t.objcopy = name
			}
		}
		t.variables = append(t.variables, row.variable+"="+name)
	}
	if t.strip == "" {
		return t, fault.New(fault.InputMissing, fmt.Sprintf("find strip: the toolchain has no bin/%sstrip", prefix),
			"publish a toolchain.tar.xz with the binutils of its compiler")
	}
	// COS's compiler looks for its own libraries below $SYSROOT.
	if root := filepath.Join("usr", strings.TrimSuffix(prefix, "-")); prefix != "" {
		if info, err := os.Stat(filepath.Join(r.Toolchain, root)); err == nil && info.IsDir() {
			t.sysroot = insideToolchain + "/" + root
		}
	}
	return t, nil
}

// findCompiler returns the compiler's name and what comes before and after the
// word for it in its companions' names.
func findCompiler(r Request, config map[string]bool, chain toolchain) (cc, prefix, suffix string, err error) {
	cc, prefix = r.Env["CC"], crossPrefix[r.Arch]
	if cc == "" {
		cc = prefix + "gcc"
		if config["CONFIG_CC_IS_CLANG"] {
			cc = prefix + "clang"
		}
	}
	const hint = "correct CC in the kernel's toolchain_env"
	if !toolPattern.MatchString(cc) {
		return "", "", "", fault.New(fault.Usage, fmt.Sprintf("compiler %q: want the name of a program in the toolchain", cc),
			hint)
	}
	if !chain.has(cc) {
		return "", "", "", fault.New(fault.InputMissing, fmt.Sprintf("find compiler: the toolchain has no bin/%s", cc),
			"publish a toolchain.tar.xz that holds the CC of its toolchain_env")
	}
	if m := compilerPattern.FindStringSubmatch(cc); m != nil {
		prefix, suffix = m[1], m[2]
	}
	// Kbuild takes its flags from the compiler at hand and its options from the
	// configuration: with another compiler, modules come out that nobody tried.
	clang := strings.Contains(cc, "clang")
	for option, other := range map[string]bool{"CONFIG_CC_IS_CLANG": !clang, "CONFIG_CC_IS_GCC": clang} {
		if config[option] && other {
			return "", "", "", fault.New(fault.Usage, fmt.Sprintf("compiler %s: the kernel's .config says %s=y", cc, option),
				hint)
		}
	}
	// clang is one program for all processors and is chosen by its name. Kbuild would
	// name the target by itself, but the driver's own tests of the kernel would not.
	if clang && r.Arch == target.ARM64 && !strings.HasPrefix(prefix, "aarch64-") {
		return "", "", "", fault.New(fault.Usage,
			fmt.Sprintf("compiler %s: its name does not say that it compiles for arm64", cc),
			"name "+crossPrefix[r.Arch]+"clang in the kernel's toolchain_env")
	}
	return cc, prefix, suffix, nil
}

// clangVariables are what Kbuild has to be told about clang beyond tools' names.
func clangVariables(config map[string]bool, chain toolchain, clang, llvm bool, prefix string) []string {
	if !clang {
		return nil
	}
	var all []string
	if llvm {
		all = append(all, "LLVM=1")
	}
	switch assembler := chain.has(prefix + "as"); {
	case config["CONFIG_AS_IS_GNU"]:
		// Kbuild makes the way to the assembler out of this prefix.
		all = append(all, "LLVM_IAS=0", "CROSS_COMPILE="+prefix)
	case config["CONFIG_AS_IS_LLVM"], !assembler:
		// Kernels before 5.13 do not say; their default would be as.
		all = append(all, "LLVM_IAS=1")
	}
	if chain.has(hostClang) {
		all = append(all, "HOSTCC="+hostClang, "HOSTCXX="+hostClang+"++")
	}
	return all
}

// companion is a make variable and the names that its tool may have, best first.
type companion struct {
	variable   string
	candidates []string
}

func companions(config map[string]bool, llvm bool, prefix, suffix string) []companion {
	linkers := []string{prefix + "ld"}
	switch {
	case config["CONFIG_LD_IS_LLD"]:
		linkers = []string{prefix + "ld.lld", "ld.lld" + suffix, "ld.lld", prefix + "ld"}
	case config["CONFIG_LD_IS_BFD"]:
		// In COS's newer toolchains plain ld is lld.
		linkers = []string{prefix + "ld.bfd", prefix + "ld"}
	}
	all := []companion{{"LD", linkers}}
	for _, variable := range []string{"AR", "NM", "OBJCOPY", "OBJDUMP", "READELF", "STRIP"} {
		name := strings.ToLower(variable)
		gnu, own := []string{prefix + name}, []string{"llvm-" + name + suffix, "llvm-" + name}
		if suffix == "" {
			own = own[1:]
		}
		if llvm {
			gnu, own = own, gnu
		}
		all = append(all, companion{variable, slices.Concat(gnu, own)})
	}
	return all
}

// environment is the whole environment of a build. Nothing of the caller's
// gets in, and everything that could tell a time, a user or a host is fixed.
func environment(t tools) map[string]string {
	env := map[string]string{
		"PATH":                   insideToolchain + "/bin:" + insideToolchain + "/usr/bin:/usr/bin:/bin",
		"HOME":                   "/nonexistent",
		"LC_ALL":                 "C",
		"TZ":                     "UTC",
		"SOURCE_DATE_EPOCH":      "0",
		"KBUILD_BUILD_USER":      "prebake",
		"KBUILD_BUILD_HOST":      "prebake",
		"KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
	}
	if t.sysroot != "" {
		env["SYSROOT"] = t.sysroot
	}
	return env
}

const maxConfig = 4 << 20

var madeBy = regexp.MustCompile(`(?m)^CONFIG_PAHOLE_VERSION=([0-9]{1,4})$`)

func readConfig(path string) ([]byte, error) {
	f, err := openHost(path)
	if err != nil {
		return nil, fault.Wrap(fault.InputMissing, fmt.Errorf("read kernel configuration: %w", err),
			"publish a kernel-headers.tgz that holds the kernel's .config")
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfig))
	if err != nil {
		return nil, fmt.Errorf("read kernel configuration: %w", err)
	}
	return text, nil
}

// parseConfig returns the options that a kernel configuration sets to y.
func parseConfig(text []byte) map[string]bool {
	set := map[string]bool{}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if name, ok := strings.CutSuffix(lines.Text(), "=y"); ok {
			set[name] = true
		}
	}
	return set
}
