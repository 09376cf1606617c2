package cosbucket

import (
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/target"
)

// The names below have the current layout, <BUILD_ID>/<BOARD>/<file>. Until 2023 the layout was <BUILD_ID>/<file>, for
// x86 only.
const (
	legacyBoard = "lakitu"
	commitFile  = "kernel_commit"
)

// Layouts returns the names that an object may have: the given name in the current layout, and then its name in the
// former layout, if there is one.
func Layouts(k target.Kernel, name string) []string {
	if rest, ok := strings.CutPrefix(name, k.BuildID+"/"+legacyBoard+"/"); ok && k.Board == legacyBoard {
		return []string{name, k.BuildID + "/" + rest}
	}
	return []string{name}
}

func under(k target.Kernel, name string) string { return path.Join(k.BuildID, k.Board, name) }

// HeadersName returns the name of the object with the kernel's header tree.
func HeadersName(k target.Kernel) string { return under(k, "kernel-headers.tgz") }

// ToolchainName returns the name of the object with the compiler.
func ToolchainName(k target.Kernel) string { return under(k, "toolchain.tar.xz") }

// ToolchainPointerName returns the name of the object that points to a compiler in another bucket; see [ParsePointer].
func ToolchainPointerName(k target.Kernel) string { return under(k, "toolchain.tar.xz.gcs") }

// ToolchainURLName returns the name of the object with the compiler's URL, in old COS builds; see [ParseToolchainURL].
func ToolchainURLName(k target.Kernel) string { return under(k, "toolchain_url") }

// ToolchainPathName returns the name of the object with the compiler's path, in COS builds of COS's own test runs; see
// [ParseToolchainPath].
func ToolchainPathName(k target.Kernel) string { return under(k, "toolchain_path") }

// VMLinuxName returns the name of the object with the kernel, its symbols and its type information.
func VMLinuxName(k target.Kernel) string { return under(k, "vmlinux") }

// ToolchainEnvName returns the name of the object that says which compiler to call.
func ToolchainEnvName(k target.Kernel) string { return under(k, "toolchain_env") }

// CommitName returns the name of the object with the kernel's source commit.
func CommitName(k target.Kernel) string { return under(k, commitFile) }

// KernelInfoName returns the name of the object with the location of the kernel's source.
func KernelInfoName(k target.Kernel) string { return under(k, "kernel_info") }

// DriverVersionsName returns the name of the object with the driver versions for each GPU type.
func DriverVersionsName(k target.Kernel) string { return under(k, "gpu_driver_versions.textproto") }

// DriverVersionsBinName returns the name of the object with the same list as [DriverVersionsName], as a serialized
// protobuf message.
func DriverVersionsBinName(k target.Kernel) string { return under(k, "gpu_driver_versions.bin") }

// DefaultVersionName returns the name of the object with the default driver version.
func DefaultVersionName(k target.Kernel) string { return under(k, "gpu_default_version") }

// LatestVersionName returns the name of the object with the latest driver version.
func LatestVersionName(k target.Kernel) string { return under(k, "gpu_latest_version") }

// BranchVersionName returns the name of the object with the version of a branch, such as R535.
func BranchVersionName(k target.Kernel, branch string) string {
	return under(k, "gpu_"+branch+"_version")
}

// SignatureNames returns the possible names of the object with Google's signatures of a driver's modules, newest first.
func SignatureNames(k target.Kernel, version string) []string {
	return []string{under(k, "extensions/gpu/nvidia-drivers-"+version+"-signature.tar.gz"),
		under(k, "extensions/gpu/"+version+".signature.tar.gz")}
}

// TrustedKeyName returns the name of the object with the kernel's built-in root certificate for Google's module
// signatures.
func TrustedKeyName(k target.Kernel) string { return under(k, "trusted_key.pem") }

// SignedDriverName returns the name of the object with the open modules of a driver, which Google compiled and signed.
func SignedDriverName(k target.Kernel, version string) string {
	return under(k, "nvidia-drivers-"+version+".tgz")
}

// BootName returns the name of the object with the files that a virtual machine needs to boot this kernel. Only
// Prebake's own mirrors have it.
func BootName(k target.Kernel) string { return under(k, "prebake-boot.tgz") }

// MD5Name returns the name of the object that has the md5, in hex, of the object with the given name.
func MD5Name(name string) string { return name + ".md5" }

// SHA256Name returns the name of the object that has the sha256, in hex, of the object with the given name. Not every
// bucket has sha256 files.
func SHA256Name(name string) string { return name + ".sha256" }

// RunfileName returns the name of the runfile of a driver version in a driver bucket.
func RunfileName(version string, arch target.Arch) string {
	machine := "x86_64"
	if arch == target.ARM64 {
		machine = "aarch64"
	}
	return "NVIDIA-Linux-" + machine + "-" + version + ".run"
}

// RunfileSumName returns the name of the object with the runfile's sha256.
func RunfileSumName(version string, arch target.Arch) string {
	return "sha256/" + RunfileName(version, arch) + ".sha256"
}

// RunfileLocation is a possible name of a runfile, with the name of the object that has the runfile's sha256.
type RunfileLocation struct{ Runfile, Sum string }

// RunfileLocations returns the possible locations of a runfile, in this order:
//
//   - COS's own layout
//   - a plain folder
//   - a folder for each version with the checksum beside the file, as NVIDIA and Google's former buckets have it
//
// A version with a suffix, such as 535.261.03-grid, may be in the folder of the version without the suffix.
func RunfileLocations(version string, arch target.Arch) []RunfileLocation {
	name := RunfileName(version, arch)
	all := []RunfileLocation{{name, RunfileSumName(version, arch)}}
	dirs := []string{"", version, path.Join("tesla", version)}
	if release := target.ModuleVersion(version); release != version {
		dirs = append(dirs, release, path.Join("tesla", release))
	}
	for _, dir := range dirs {
		at := path.Join(dir, name)
		all = append(all, RunfileLocation{at, SHA256Name(at)}, RunfileLocation{at, at + ".sha256sum"})
	}
	return all
}

var runfileName = regexp.MustCompile(`(?:^|/)NVIDIA-Linux-(x86_64|aarch64)-([0-9][0-9a-z.-]*)\.run$`)

// ParseRunfile parses the name of an object in a driver bucket. ok is true if the name is one of a runfile's
// [RunfileLocations].
func ParseRunfile(object string) (version string, arch target.Arch, ok bool) {
	m := runfileName.FindStringSubmatch(object)
	if m == nil || !target.ValidVersion(m[2]) {
		return "", "", false
	}
	version, arch = m[2], target.AMD64
	if m[1] == "aarch64" {
		arch = target.ARM64
	}
	return version, arch, slices.ContainsFunc(RunfileLocations(version, arch),
		func(p RunfileLocation) bool { return p.Runfile == object })
}
