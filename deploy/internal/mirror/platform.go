package mirror

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/prebake/prebake/pkg/target"
)

// platform is all that differs between the mirror's architectures. Kernels and
// drivers of another one than the machine's are cross-compiled with tools of
// the machine's: Debian's kbuild programs and compilers are its own.
type platform struct {
	arch target.Arch
	// flavour is Debian's kernel flavour: for amd64 the smallest one, for virtual
	// machines; for arm64 the plain one, which has DRM, so that nvidia-drm gets
	// something to do somewhere.
	flavour string
	// kernelArch is the kernel's folder below arch/.
	kernelArch string
	// foreign is the suffix by which apt tells packages of this architecture
	// from the machine's; "" means the machine's own.
	foreign string
	// runfile is what NVIDIA calls the architecture.
	runfile string
	// triplet is the GNU name; prefix is how COS's SDK names its tools.
	triplet, prefix string
	// gccDir is the compiler's own folder: the driver finds it, and as and ld
	// behind it, by the way from its own place. No wrapper is needed.
	gccDir string
	// toolchain are the packages of the compiler and the binary tools.
	toolchain []string
	// oldest says to take one kernel, the oldest, where none is named.
	oldest bool
}

// libraryPackages hold every library that the tools load, save libc, which is
// the machine's.
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

// board returns the COS board of this architecture.
func (p platform) board(amd64 string) string {
	if p.arch == target.AMD64 {
		return amd64
	}
	return "lakitu-" + string(p.arch)
}

// env is the content of toolchain_env.
func (p platform) env() string { return "CC=" + p.prefix + "gcc\nCXX=" + p.prefix + "gcc\n" }

// headers matches the names of Debian's header packages: what comes before the
// flavour, the series in it, and the ABI number in one of two places.
func (p platform) headers() *regexp.Regexp {
	return regexp.MustCompile(`^linux-headers-(([0-9]+\.[0-9]+)\.(?:0-([0-9]{1,6})|([0-9]{1,6})\+deb[0-9]+))-` +
		regexp.QuoteMeta(p.flavour) + `$`)
}

// named returns package names as apt takes them.
func (p platform) named(names ...string) []string {
	var all []string
	for _, name := range names {
		all = append(all, name+p.foreign)
	}
	return all
}

// plain returns what apt said about packages without the architecture's suffix.
func (p platform) plain(versions map[string][]string) map[string][]string {
	all := map[string][]string{}
	for name, v := range versions {
		all[strings.TrimSuffix(name, p.foreign)] = v
	}
	return all
}

// aptDir is the folder of apt's lists: those of one architecture alone have
// nothing to do with the other's.
func (p platform) aptDir() string {
	if p.foreign == "" {
		return "debian"
	}
	return "debian-" + string(p.arch)
}

// aptConf is what apt has to be told besides. The machine's dpkg stays as it is.
func (p platform) aptConf() string {
	if p.foreign == "" {
		return ""
	}
	return fmt.Sprintf("APT::Architectures { %q; %q; };\n", target.AMD64, p.arch)
}
