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

// kernelArch is Kbuild's word for an architecture, as `uname -m` of the target
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
	strip     string   // name of the strip program
	sysroot   string   // path inside the sandbox; may be empty
	clang     bool

	modVersions bool // CONFIG_MODVERSIONS of the kernel
}

// A tool is named, not given as a command line: it is looked up in the
// toolchain's bin folders only.
var toolPattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._+-]{0,63}$`)

// findTools looks up the compiler and its companions in the toolchain folder.
// COS's recipe is the same: the name in toolchain_env, the others by its prefix.
func findTools(r Request) (tools, error) {
	var t tools
	config, err := readConfig(filepath.Join(r.Headers, ".config"))
	if err != nil {
		return t, err
	}
	t.modVersions = config["CONFIG_MODVERSIONS"]
	has := func(name string) bool {
		for _, dir := range []string{"bin", "usr/bin"} {
			// Lstat: a link may lead to where only the sandbox has a file.
			if info, err := os.Lstat(filepath.Join(r.Toolchain, dir, name)); err == nil && !info.IsDir() {
				return true
			}
		}
		return false
	}
	cc := r.Env["CC"]
	if cc == "" {
		cc = crossPrefix[r.Arch] + "gcc"
	}
	if !toolPattern.MatchString(cc) {
		return t, fault.New(fault.Usage, fmt.Sprintf("compiler %q: want the name of a program in the toolchain", cc), "correct CC in the kernel's toolchain_env")
	}
	if !has(cc) {
		return t, fault.New(fault.InputMissing, fmt.Sprintf("find compiler: the toolchain has no bin/%s", cc),
			"publish a toolchain.tar.xz that holds the CC of its toolchain_env")
	}
	t.clang = strings.Contains(cc, "clang")
	t.variables = []string{"CC=" + cc}
	prefix := crossPrefix[r.Arch]
	if i := strings.LastIndexByte(cc, '-'); i >= 0 {
		prefix = cc[:i+1]
	}
	linkers := []string{prefix + "ld"}
	if config["CONFIG_LD_IS_LLD"] {
		linkers = []string{prefix + "ld.lld", "ld.lld", prefix + "ld"}
	}
	rows := []struct {
		variable   string
		candidates []string
	}{
		{"LD", linkers},
		{"AR", []string{prefix + "ar", "llvm-ar"}},
		{"NM", []string{prefix + "nm", "llvm-nm"}},
		{"OBJCOPY", []string{prefix + "objcopy", "llvm-objcopy"}},
		{"OBJDUMP", []string{prefix + "objdump", "llvm-objdump"}},
		{"READELF", []string{prefix + "readelf", "llvm-readelf"}},
		{"STRIP", []string{prefix + "strip", "llvm-strip"}},
	}
	for _, row := range rows {
		if named := r.Env[row.variable]; toolPattern.MatchString(named) {
			row.candidates = append([]string{named}, row.candidates...)
		}
		// One that is missing keeps its name: a build that needs it then fails
		// over that name, instead of taking the host's tool unseen.
		name := row.candidates[0]
		if i := slices.IndexFunc(row.candidates, has); i >= 0 {
			name = row.candidates[i]
			if row.variable == "STRIP" {
				t.strip = name
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

// readConfig returns the options that a kernel configuration sets to y.
func readConfig(path string) (map[string]bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.Wrap(fault.InputMissing, fmt.Errorf("read kernel configuration: %w", err),
			"publish a kernel-headers.tgz that holds the kernel's .config")
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfig))
	if err != nil {
		return nil, fmt.Errorf("read kernel configuration: %w", err)
	}
	set := map[string]bool{}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if name, ok := strings.CutSuffix(lines.Text(), "=y"); ok {
			set[name] = true
		}
	}
	return set, nil
}
