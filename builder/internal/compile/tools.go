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

// Paths inside the sandbox. Debug information contains these paths. So if one path changes, the unstripped modules
// change, and the stripped modules may change.
const (
	insideToolchain = "/prebake/toolchain"
	insideKernel    = "/prebake/kernel"
	insideSource    = "/prebake/src"
	insideOut       = "/prebake/out"
)

// kernelArch has the value of `make`'s variable ARCH for each architecture. NVIDIA's makefiles turn x86_64 into x86.
var kernelArch = map[target.Arch]string{target.AMD64: "x86_64", target.ARM64: "arm64"}

// crossPrefix is the common start of the tools' names in COS's toolchain archives.
var crossPrefix = map[target.Arch]string{
	target.AMD64: "x86_64-cros-linux-gnu-",
	target.ARM64: "aarch64-cros-linux-gnu-",
}

// tools holds the toolchain's tools and the options of the kernel's configuration that matter for a build.
type tools struct {
	variables []string // make variables such as CC=name
	compiler  string   // path inside the sandbox
	strip     string   // file name of the toolchain's strip
	objcopy   string   // file name of the toolchain's objcopy; "" if it has none
	sysroot   string   // path inside the sandbox; may be empty
	clang     bool

	modVersions bool // CONFIG_MODVERSIONS of the kernel
	btf         bool // CONFIG_DEBUG_INFO_BTF_MODULES of the kernel
	pahole      int  // CONFIG_PAHOLE_VERSION: 124 means 1.24; 0 means not in the kernel's configuration
}

// toolPattern allows a file name only. Tools are looked up in the toolchain's bin folders only.
var toolPattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._+-]{0,63}$`)

// compilerPattern finds the prefix of a compiler's name, which the other tools share, and the version at the end, as in
// Debian's names.
var compilerPattern = regexp.MustCompile(`^(.*-)?(?:gcc|clang|cc)(-[0-9.]+)?$`)

// hostClang is the compiler in COS's toolchains for programs that run during the build.
const hostClang = "x86_64-pc-linux-gnu-clang"

// clangFlags switch -Werror off for the driver's sources and conftest's programs. For a test of conftest.sh, any
// compiler error is a result. With the kernel's CONFIG_WERROR, as in 5.15, clang's warning about an undeclared function
// becomes an error, and conftest concludes that the kernel has the function. With gcc this warning is off. A flag of
// the form -Werror=NAME still makes the warning NAME an error; NVIDIA's makefiles have such flags.
//
// The kernel's flags contain -Werror=strict-prototypes. Older drivers do not compile with this flag, because clang
// applies the rule more strictly than gcc. COS's own build farm switches it off too.
var clangFlags = []string{"-Wno-error", "-Wno-error=strict-prototypes"}

// toolchain is the root of an unpacked toolchain archive; its methods look programs up.
type toolchain string

func (t toolchain) has(name string) bool { return t.pathOf(name) != "" }

// pathOf returns the path that a program of the toolchain has inside the sandbox, or "" if the toolchain does not have
// it.
func (t toolchain) pathOf(name string) string {
	for _, dir := range []string{"bin", "usr/bin"} {
		// Lstat, because the target of a link may exist only inside the sandbox.
		if info, err := os.Lstat(filepath.Join(string(t), dir, name)); err == nil && !info.IsDir() {
			return insideToolchain + "/" + dir + "/" + name
		}
	}
	return ""
}

// findTools chooses the compiler and its companion tools: linker, assembler and others. If clang and lld built the
// kernel, `make` ran with LLVM=1, so the modules are built with LLVM=1 too. For any other kernel, findTools chooses the
// binutils whose names begin with the compiler's prefix.
func findTools(r Request) (tools, error) {
	var t tools
	text, err := readConfig(filepath.Join(r.Headers, ".config"))
	if err != nil {
		return t, err
	}
	config := parseConfig(text)
	if m := madeBy.FindSubmatch(text); m != nil {
		t.pahole, _ = strconv.Atoi(string(m[1])) // the pattern allows digits only
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
	t.compiler = chain.pathOf(cc)
	llvm := t.clang && config["CONFIG_LD_IS_LLD"]
	t.variables = append(t.variables, clangVariables(config, chain, t.clang, llvm, prefix)...)
	for _, row := range companions(config, llvm, prefix, suffix) {
		if named := r.Env[row.variable]; toolPattern.MatchString(named) {
			row.candidates = append([]string{named}, row.candidates...)
		}
		// If the toolchain has none of the candidates, `make` gets the first name. A build that needs the tool then fails.
		// Without a name, `make` would use the host's tool unnoticed.
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
	// COS's compiler searches its own libraries below $SYSROOT.
	if root := filepath.Join("usr", strings.TrimSuffix(prefix, "-")); prefix != "" {
		if info, err := os.Stat(filepath.Join(r.Toolchain, root)); err == nil && info.IsDir() {
			t.sysroot = insideToolchain + "/" + root
		}
	}
	return t, nil
}

// findCompiler returns the compiler's name, and the prefix and suffix of its companion tools.
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
			"publish a toolchain.tar.xz with this compiler, or correct CC in the kernel's toolchain_env")
	}
	if m := compilerPattern.FindStringSubmatch(cc); m != nil {
		prefix, suffix = m[1], m[2]
	}
	// Kbuild chooses some flags by the compiler and others by the kernel's configuration. If the two disagree, nobody
	// has tested the resulting modules.
	clang := strings.Contains(cc, "clang")
	for option, other := range map[string]bool{"CONFIG_CC_IS_CLANG": !clang, "CONFIG_CC_IS_GCC": clang} {
		if config[option] && other {
			return "", "", "", fault.New(fault.Usage,
				fmt.Sprintf("compiler %s: .config says %s=y, so another compiler built the kernel", cc, option), hint)
		}
	}
	// One clang program compiles for all processors. Without a flag for the processor, clang derives the processor from
	// its own file name. Kbuild sets a flag, but the driver's conftest does not.
	if clang && r.Arch == target.ARM64 && !strings.HasPrefix(prefix, "aarch64-") {
		return "", "", "", fault.New(fault.Usage,
			fmt.Sprintf("the name of compiler %s does not say that the compiler makes arm64 programs", cc),
			"set CC="+crossPrefix[r.Arch]+"clang in the kernel's toolchain_env")
	}
	return cc, prefix, suffix, nil
}

// clangVariables returns the make variables that kbuild needs for clang besides the tools' names.
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
		// Kbuild derives the assembler's path from this prefix.
		all = append(all, "LLVM_IAS=0", "CROSS_COMPILE="+prefix)
	case config["CONFIG_AS_IS_LLVM"], !assembler:
		// LLVM_IAS=1 selects clang's own assembler. Before Linux 5.13, the configuration does not name the assembler
		// that built the kernel. Then the toolchain's GNU assembler is used, or clang's own if the toolchain has no GNU
		// assembler.
		all = append(all, "LLVM_IAS=1")
	}
	if chain.has(hostClang) {
		all = append(all, "HOSTCC="+hostClang, "HOSTCXX="+hostClang+"++")
	}
	return all
}

// companion is the make variable of a tool, with the possible names of the tool, the best first.
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
		// In COS's newer toolchains the program ld is lld.
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

// environment returns the complete environment of a build. Everything that could reveal a time, a user or a host has a
// fixed value.
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
			"publish a kernel-headers.tgz that contains the kernel's .config")
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, fmt.Errorf("read kernel configuration: %w", err)
	}
	if len(text) > maxConfig {
		return nil, fault.New(fault.CheckFailed, "read kernel configuration: .config has more than 4 MiB",
			"check that .config in kernel-headers.tgz is the kernel's configuration")
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
