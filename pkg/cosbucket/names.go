package cosbucket

import (
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/target"
)

// The names below are those of the current layout, <BUILD_ID>/<BOARD>/<file>.
// Until 2023 builds were laid out as <BUILD_ID>/<file>, for x86 alone.
const (
	legacyBoard = "lakitu"
	commitFile  = "kernel_commit"
)

// Layouts returns the names that an object of a build may have, the likelier
// first, given its name in the current layout.
func Layouts(k target.Kernel, name string) []string {
	if rest, ok := strings.CutPrefix(name, k.BuildID+"/"+legacyBoard+"/"); ok && k.Board == legacyBoard {
		return []string{name, k.BuildID + "/" + rest}
	}
	return []string{name}
}

func under(k target.Kernel, name string) string { return path.Join(k.BuildID, k.Board, name) }

// HeadersName returns the object that holds the kernel's header tree.
func HeadersName(k target.Kernel) string { return under(k, "kernel-headers.tgz") }

// ToolchainName returns the object that holds the compiler.
func ToolchainName(k target.Kernel) string { return under(k, "toolchain.tar.xz") }

// ToolchainPointerName returns the object that says where the compiler is when
// it is not in the bucket itself; see [ParsePointer].
func ToolchainPointerName(k target.Kernel) string { return under(k, "toolchain.tar.xz.gcs") }

// ToolchainURLName returns the object in which old builds say where the
// compiler is; see [ParseToolchainURL].
func ToolchainURLName(k target.Kernel) string { return under(k, "toolchain_url") }

// ToolchainPathName returns the object in which builds of COS's own test runs
// say where the compiler is; see [ParseToolchainPath].
func ToolchainPathName(k target.Kernel) string { return under(k, "toolchain_path") }

// VMLinuxName returns the object that holds the kernel with its symbols and
// types.
func VMLinuxName(k target.Kernel) string { return under(k, "vmlinux") }

// ToolchainEnvName returns the object that names the compiler to call.
func ToolchainEnvName(k target.Kernel) string { return under(k, "toolchain_env") }

// CommitName returns the object that holds the kernel's source commit.
func CommitName(k target.Kernel) string { return under(k, commitFile) }

// KernelInfoName returns the object that says where the kernel's source is.
func KernelInfoName(k target.Kernel) string { return under(k, "kernel_info") }

// DriverVersionsName returns the object that lists the driver versions for each
// kind of GPU.
func DriverVersionsName(k target.Kernel) string { return under(k, "gpu_driver_versions.textproto") }

// DriverVersionsBinName returns the object that holds the same list, serialized.
func DriverVersionsBinName(k target.Kernel) string { return under(k, "gpu_driver_versions.bin") }

// DefaultVersionName returns the object that holds the default driver version.
func DefaultVersionName(k target.Kernel) string { return under(k, "gpu_default_version") }

// LatestVersionName returns the object that holds the latest driver version.
func LatestVersionName(k target.Kernel) string { return under(k, "gpu_latest_version") }

// BranchVersionName returns the object that holds the version of a branch, such
// as R535.
func BranchVersionName(k target.Kernel, branch string) string {
	return under(k, "gpu_"+branch+"_version")
}

// SignatureNames returns the objects that may hold Google's signatures of a
// driver's modules, the newer name first.
func SignatureNames(k target.Kernel, version string) []string {
	return []string{under(k, "extensions/gpu/nvidia-drivers-"+version+"-signature.tar.gz"),
		under(k, "extensions/gpu/"+version+".signature.tar.gz")}
}

// TrustedKeyName returns the object that holds the root certificate that the
// kernel was built with, by which it knows Google's signatures.
func TrustedKeyName(k target.Kernel) string { return under(k, "trusted_key.pem") }

// SignedDriverName returns the object that holds the open modules of a driver
// as Google compiled and signed them.
func SignedDriverName(k target.Kernel, version string) string {
	return under(k, "nvidia-drivers-"+version+".tgz")
}

// BootName returns the object that holds what a test machine needs to boot this
// kernel. It is Prebake's own; COS's buckets have none.
func BootName(k target.Kernel) string { return under(k, "prebake-boot.tgz") }

// MD5Name returns the object that holds another object's md5, in hex.
func MD5Name(name string) string { return name + ".md5" }

// SHA256Name returns the object that holds another object's sha256, in hex,
// where a bucket publishes that.
func SHA256Name(name string) string { return name + ".sha256" }

// RunfileName returns the driver bucket's object for a driver version.
func RunfileName(version string, arch target.Arch) string {
	machine := "x86_64"
	if arch == target.ARM64 {
		machine = "aarch64"
	}
	return "NVIDIA-Linux-" + machine + "-" + version + ".run"
}

// RunfileSumName returns the object that holds the runfile's sha256.
func RunfileSumName(version string, arch target.Arch) string {
	return "sha256/" + RunfileName(version, arch) + ".sha256"
}

// RunfileLocation is where a bucket may have a runfile, and where its sha256.
type RunfileLocation struct{ Runfile, Sum string }

// RunfileLocations returns where buckets have a driver version: COS's own first,
// then a plain folder, and then NVIDIA's download server and Google's former
// buckets, which have a folder for each version and the sum beside the file. An
// edition with a suffix may are in the folder of its release.
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

// ParseRunfile reads the name of an object of a driver bucket. ok says that it is a
// runfile in one of its [RunfileLocations].
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
