// Package target defines the domain terms of Prebake as small comparable values. It does no I/O.
//
//   - A kernel is the kernel of one COS build on one board. BUILD_ID and board identify it; commit, release and version
//     describe it. Several COS builds share one `uname -r`, and COS does not set MODVERSIONS, so a kernel release
//     alone does not identify a kernel.
//   - A driver is one NVIDIA release in one flavour (proprietary or open).
//   - A fingerprint is a digest over everything that decides whether a module fits a kernel. Kernels with one
//     fingerprint share one artifact.
//   - A cell is a kernel and a driver; a build makes it into an artifact.
//   - An artifact is one OCI image manifest, named by its digest.
//   - A node is a machine that boots a kernel and wants a driver.
package target

import (
	"encoding/hex"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// Arch is a machine architecture, in the spelling of Go and OCI.
type Arch string

// The architectures that COS has.
const (
	AMD64 Arch = "amd64"
	ARM64 Arch = "arm64"
)

// Kernel identifies and describes the kernel of one COS build on one board.
type Kernel struct {
	// BuildID is BUILD_ID of /etc/os-release, such as 17800.0.47.
	BuildID string `json:"buildId"`
	// Board is CHROMEOS_RELEASE_BOARD of /etc/lsb-release, such as lakitu.
	Board string `json:"board"`
	// Milestone is VERSION of /etc/os-release, such as 109; 0 means unknown.
	Milestone int `json:"milestone,omitempty"`
	// Commit is the kernel's source commit, 40 hex digits; "" means unknown.
	Commit string `json:"commit,omitempty"`
	// Release is the output of `uname -r`.
	Release string `json:"release,omitempty"`
	// Version is the output of `uname -v`; "" means that the kernel's headers do not contain it.
	Version string `json:"version,omitempty"`
	// Arch is the architecture of the board; see [BoardArch].
	Arch Arch `json:"arch,omitempty"`
}

// String returns BUILD_ID/BOARD, the name that people and buckets use.
func (k Kernel) String() string { return k.BuildID + "/" + k.Board }

var (
	buildIDPattern = regexp.MustCompile(`^[0-9]{1,9}\.[0-9]{1,9}\.[0-9]{1,9}$`)
	boardPattern   = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,63}$`)
	commitPattern  = regexp.MustCompile(`^[0-9a-f]{40}$`)
	versionPattern = regexp.MustCompile(`^[0-9]{1,5}(\.[0-9]{1,5}){1,3}((?:-[a-z][a-z0-9]{0,15}){0,2})$`)
	branchPattern  = regexp.MustCompile(`^R[0-9]{3,4}$`)
)

// ParseKernel checks a BUILD_ID and a board, and returns their kernel. The board's name decides the architecture.
func ParseKernel(buildID, board string) (Kernel, error) {
	if !buildIDPattern.MatchString(buildID) {
		return Kernel{}, fmt.Errorf("BUILD_ID %q: want three numbers with dots, as in 17800.66.78", buildID)
	}
	if !boardPattern.MatchString(board) {
		return Kernel{}, fmt.Errorf("board %q: want a name such as lakitu or lakitu-arm64", board)
	}
	return Kernel{BuildID: buildID, Board: board, Arch: BoardArch(board)}, nil
}

var (
	releasePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9.+~_-]{0,127}$`)
	unamePattern   = regexp.MustCompile(`^[ -~]{1,200}$`) // of `uname -v`: printable ASCII
)

// Check returns an error for the first field that is malformed. Only BUILD_ID and board are required.
func (k Kernel) Check() error {
	if _, err := ParseKernel(k.BuildID, k.Board); err != nil {
		return err
	}
	switch {
	case k.Milestone < 0 || k.Milestone > 9999:
		return fmt.Errorf("milestone %d of kernel %s: want a number such as 109", k.Milestone, k)
	case k.Commit != "" && !ValidCommit(k.Commit):
		return fmt.Errorf("commit %.50q of kernel %s: want 40 hex digits", k.Commit, k)
	case k.Release != "" && !releasePattern.MatchString(k.Release):
		return fmt.Errorf("release %.50q of kernel %s: want a text as \"uname -r\" prints it", k.Release, k)
	case k.Version != "" && !unamePattern.MatchString(k.Version):
		return fmt.Errorf("version %.50q of kernel %s: want a text as \"uname -v\" prints it", k.Version, k)
	case k.Arch != "" && k.Arch != BoardArch(k.Board):
		return fmt.Errorf("architecture %.20q of kernel %s: want %s, the architecture of board %s", k.Arch, k,
			BoardArch(k.Board), k.Board)
	}
	return nil
}

// BoardArch returns the architecture of a COS board. The names of Arm boards end in -arm64, as in lakitu-arm64.
func BoardArch(board string) Arch {
	if strings.HasSuffix(board, "-arm64") {
		return ARM64
	}
	return AMD64
}

// ValidCommit reports whether s is a complete commit id.
func ValidCommit(s string) bool { return commitPattern.MatchString(s) }

// Flavour says which of NVIDIA's two source trees of kernel modules was compiled.
type Flavour string

// The two flavours. Branches from R620 on have only Open.
const (
	Proprietary Flavour = "proprietary"
	Open        Flavour = "open"
)

// ParseFlavour reads a flavour's name.
func ParseFlavour(s string) (Flavour, error) {
	switch f := Flavour(s); f {
	case Proprietary, Open:
		return f, nil
	}
	return "", fmt.Errorf("flavour %q: want proprietary or open", s)
}

// Driver is one NVIDIA release in one flavour.
type Driver struct {
	// Version is NVIDIA's version, such as 535.261.03, with the suffix in the runfile's name, as in 535.261.03-grid; see
	// [ModuleVersion].
	Version string  `json:"version"`
	Flavour Flavour `json:"flavour"`
}

// String returns version-flavour.
func (d Driver) String() string { return d.Version + "-" + string(d.Flavour) }

// ParseDriver checks a version and a flavour.
func ParseDriver(version, flavour string) (Driver, error) {
	if !ValidVersion(version) {
		return Driver{}, fmt.Errorf("driver version %q: want numbers with dots, as in 535.261.03 or 535.261.03-grid", version)
	}
	f, err := ParseFlavour(flavour)
	if err != nil {
		return Driver{}, err
	}
	return Driver{Version: version, Flavour: f}, nil
}

// Modules returns the driver without the suffix that its version has in the runfile's name. Modules, libraries and
// firmware do not contain that suffix.
func (d Driver) Modules() Driver { return Driver{ModuleVersion(d.Version), d.Flavour} }

// ValidVersion reports whether s has the format of an NVIDIA driver version: two to four numbers with dots, then up to
// two words, each after a dash. The words name an edition: NVIDIA-Linux-x86_64-535.261.03-grid.run is for guests of
// vGPU. A flavour's name is not such a word, because tags have the flavour after the version.
func ValidVersion(s string) bool {
	m := versionPattern.FindStringSubmatch(s)
	if m == nil {
		return false
	}
	for word := range strings.SplitSeq(m[2], "-") {
		if _, err := ParseFlavour(word); err == nil {
			return false
		}
	}
	return true
}

// ModuleVersion returns a driver version without the suffix of its runfile. The modules, NVML and the kernel's log
// print this version. The names of the libraries and of the firmware's folder contain it.
func ModuleVersion(version string) string {
	number, _, _ := strings.Cut(version, "-")
	return number
}

// Branch returns the driver branch, such as R535 for 535.261.03.
func (d Driver) Branch() string { return Branch(d.Version) }

// Branch returns the branch of a driver version: R and the major number.
func Branch(version string) string {
	major, _, _ := strings.Cut(version, ".")
	return "R" + major
}

// CompareVersions compares two driver versions or two BUILD_IDs by number, field by field, and then by suffix. It
// returns -1, 0 or 1. A missing field comes before 0.
func CompareVersions(a, b string) int {
	a, suffix, _ := strings.Cut(a, "-")
	b, other, _ := strings.Cut(b, "-")
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i := 0; i < len(as) || i < len(bs); i++ {
		x, y := -1, -1
		if i < len(as) {
			x, _ = strconv.Atoi(as[i])
		}
		if i < len(bs) {
			y, _ = strconv.Atoi(bs[i])
		}
		if x != y {
			if x < y {
				return -1
			}
			return 1
		}
	}
	return strings.Compare(suffix, other)
}

// Wish is a request for a driver before a version is chosen.
type Wish string

// The two wishes that are words, named like COS's fields gpu_default_version and gpu_latest_version.
const (
	Default Wish = "default"
	Latest  Wish = "latest"
)

// ParseWish reads default, latest, a branch or an exact version.
func ParseWish(s string) (Wish, error) {
	if s == string(Default) || s == string(Latest) || branchPattern.MatchString(s) || ValidVersion(s) {
		return Wish(s), nil
	}
	return "", fmt.Errorf("driver %q: want default, latest, a branch such as R535, or a version such as 535.261.03", s)
}

// gpuPattern matches COS's gpu_type values, such as NVIDIA_L4 and NVIDIA_H100_80GB (gpu_driver_versions.proto of
// cos/tools).
var gpuPattern = regexp.MustCompile(`^[A-Z0-9][A-Z0-9_]{0,63}$`)

// ValidGPU reports whether a text is formatted as a gpu_type of COS.
func ValidGPU(s string) bool { return gpuPattern.MatchString(s) }

// ParseGPUWish reads every wish that ParseWish reads, and also default, latest or a branch for one GPU type, as in
// default@NVIDIA_L4.
func ParseGPUWish(s string) (Wish, error) {
	name, gpu, found := strings.Cut(s, "@")
	w, err := ParseWish(name)
	if err != nil || !found {
		return w, err
	}
	if _, exact := w.Exact(); exact || !ValidGPU(gpu) {
		return "", fmt.Errorf("driver %q: want default, latest or a branch before the @, and COS's name of a GPU type "+
			"after the @, as in default@NVIDIA_L4", s)
	}
	return Wish(s), nil
}

// ParseWishLabel reads a wish from the value of a Kubernetes label, which cannot contain @. So a dot is before the GPU
// type, as in default.NVIDIA_L4. It reads everything else as ParseGPUWish does.
func ParseWishLabel(s string) (Wish, error) {
	name, gpu, found := strings.Cut(s, ".")
	if _, err := ParseWish(name); found && err == nil { // what is before the first dot of a version is no wish
		if w, err := ParseGPUWish(name + "@" + gpu); err == nil {
			return w, nil
		}
		return "", fmt.Errorf("driver %q: want COS's name of a GPU type after the dot, as in default.NVIDIA_L4", s)
	}
	w, err := ParseWish(s)
	if err != nil {
		return "", fmt.Errorf("%w; for a GPU type, want for example default.NVIDIA_L4", err)
	}
	return w, nil
}

// GPU splits a wish into the wish without its GPU type, and the GPU type; "" means any GPU.
func (w Wish) GPU() (Wish, string) {
	name, gpu, _ := strings.Cut(string(w), "@")
	return Wish(name), gpu
}

// Exact returns the version, and true, if the wish is an exact version.
func (w Wish) Exact() (string, bool) { return string(w), ValidVersion(string(w)) }

// BranchName returns the branch, and true, if the wish is a branch.
func (w Wish) BranchName() (string, bool) { return string(w), branchPattern.MatchString(string(w)) }

// Fingerprint is the ABI fingerprint of a kernel: "sha256:" and 64 hex digits. The hash covers the header tree (without
// timestamps), the configuration, Module.symvers and the toolchain.
type Fingerprint string

// ParseFingerprint checks the format of a fingerprint.
func ParseFingerprint(s string) (Fingerprint, error) {
	sum, ok := strings.CutPrefix(s, "sha256:")
	if raw, err := hex.DecodeString(sum); !ok || err != nil || len(raw) != 32 || strings.ToLower(sum) != sum {
		return "", fmt.Errorf("fingerprint %q: want sha256: and 64 lower-case hex digits", s)
	}
	return Fingerprint(s), nil
}

// Short returns the first 16 hex digits, for names that people read. Do not compare fingerprints by them.
func (f Fingerprint) Short() string {
	sum := strings.TrimPrefix(string(f), "sha256:")
	return sum[:min(16, len(sum))]
}

// sortFields is the largest number of fields in a version. Driver versions have up to four fields, BUILD_IDs three.
const sortFields = 4

// SortKey returns a key for a driver version or a BUILD_ID. Compared byte by byte, as databases do, keys have the order
// of [CompareVersions].
func SortKey(version string) string {
	numbers, suffix, _ := strings.Cut(version, "-")
	fields := strings.Split(numbers, ".")
	var key strings.Builder
	for i := range sortFields {
		n := 0 // a missing field comes before 0
		if i < len(fields) {
			n, _ = strconv.Atoi(fields[i])
			n++
		}
		fmt.Fprintf(&key, "%010d", n)
	}
	return key.String() + suffix
}
