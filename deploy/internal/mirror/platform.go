package mirror

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/prebake/prebake/pkg/target"
)

// platform has everything that differs between the mirror's architectures. Modules for a foreign architecture are
// cross-compiled, with Debian's programs for the machine's own architecture.
type platform struct {
	arch target.Arch
	// flavour is Debian's kernel flavour. For amd64 it is the smallest one, for virtual machines. For arm64 it is the
	// plain one, which has DRM: at least one kernel of the mirror must be able to load nvidia-drm.
	flavour string
	// kernelArch is the name of the kernel's folder below arch/.
	kernelArch string
	// foreign is apt's suffix for packages of this architecture; "" means the machine's own.
	foreign string
	// runfile is NVIDIA's name of the architecture.
	runfile string
	// triplet is the GNU name of the architecture. prefix is the beginning of the tools' names, as in COS's SDK.
	triplet, prefix string
	// gccDir is the compiler's own folder. The compiler finds this folder, and from there the programs as and ld, by
	// relative paths.
	gccDir string
	// toolchain are the packages with the compiler and the binary tools.
	toolchain []string
	// If oldest is true, the mirror gets only the default driver, and only the oldest kernel unless Config.ABIs has
	// numbers.
	oldest bool
}

// libraryPackages contain all libraries of the tools, except libc, which comes from the machine.
var libraryPackages = []string{
	"libbinutils", "libctf0", "libctf-nobfd0",
	"libisl23", "libmpc3", "libmpfr6", "libgmp10", "libjansson4", "libzstd1", "zlib1g",
}

var platforms = map[target.Arch]platform{
	target.AMD64: {
		arch: target.AMD64, flavour: "cloud-amd64", kernelArch: "x86", runfile: "x86_64",
		triplet: "x86_64-linux-gnu", prefix: prefix, gccDir: "lib/gcc/x86_64-linux-gnu/" + gccMajor,
		toolchain: toolchainPackages,
	},
	target.ARM64: {
		arch: target.ARM64, flavour: "arm64", kernelArch: "arm64", foreign: ":arm64", runfile: "aarch64",
		triplet: "aarch64-linux-gnu", prefix: "aarch64-cros-linux-gnu-",
		gccDir: "lib/gcc-cross/aarch64-linux-gnu/" + gccMajor,
		toolchain: append([]string{
			"gcc-" + gccMajor + "-aarch64-linux-gnu", "cpp-" + gccMajor + "-aarch64-linux-gnu",
			"libgcc-" + gccMajor + "-dev-arm64-cross", "binutils-aarch64-linux-gnu",
		}, libraryPackages...),
		oldest: true,
	},
}

// board returns the COS board of this architecture. For amd64, it returns its argument.
func (p platform) board(amd64 string) string {
	if p.arch == target.AMD64 {
		return amd64
	}
	return "lakitu-" + string(p.arch)
}

// env returns the content of toolchain_env.
func (p platform) env() string { return "CC=" + p.prefix + "gcc\nCXX=" + p.prefix + "gcc\n" }

// headers matches the names of Debian's header packages. Group 1 is the version before the flavour, and group 2 the
// series. The ABI number is group 3 in a version like 6.1.0-47, and group 4 in a version like 6.12.117+deb12.
func (p platform) headers() *regexp.Regexp {
	return regexp.MustCompile(`^linux-headers-(([0-9]+\.[0-9]+)\.(?:0-([0-9]{1,6})|([0-9]{1,6})\+deb[0-9]+))-` +
		regexp.QuoteMeta(p.flavour) + `$`)
}

// aptNames returns package names with the suffix of the architecture, as apt needs it.
func (p platform) aptNames(names ...string) []string {
	var all []string
	for _, name := range names {
		all = append(all, name+p.foreign)
	}
	return all
}

// plainNames returns the versions of packages, by package name without the architecture's suffix.
func (p platform) plainNames(versions map[string][]string) map[string][]string {
	all := map[string][]string{}
	for name, v := range versions {
		all[strings.TrimSuffix(name, p.foreign)] = v
	}
	return all
}

// aptDir returns the name of apt's folder in the cache. Each architecture has a folder of its own.
func (p platform) aptDir() string {
	if p.foreign == "" {
		return "debian"
	}
	return "debian-" + string(p.arch)
}

// aptConf returns additional settings for apt. They let apt download packages for another architecture without a change
// to the machine's dpkg.
func (p platform) aptConf() string {
	if p.foreign == "" {
		return ""
	}
	return fmt.Sprintf("APT::Architectures { %q; %q; };\n", target.AMD64, p.arch)
}
