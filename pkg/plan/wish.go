// Package plan turns a wish list into cells. A wish list is a YAML file that a person maintains: the wanted COS builds,
// drivers and flavours. Parse reads the file and reports every mistake, with its line. Expand asks a COS release bucket
// what exists, and returns a cell for each combination of kernel, driver version and flavour.
//
// The package reports unknown fields, milestones without COS builds, and drivers that COS does not offer; it never
// skips them silently. It opens a connection only in LoadImageMap.
package plan

import (
	"github.com/prebake/prebake/pkg/target"
)

// FormatVersion is the version of the wish list's file format.
const FormatVersion = 1

// MaxFile is the maximum size of a wish list in bytes.
const MaxFile = 1 << 20

// Upper limits for the content of a wish list. They are far above what a farm can build in a day.
const (
	maxLatest    = 1000   // COS builds that one entry may ask for
	maxCells     = 20_000 // cells of one plan
	minMilestone = 60
	maxMilestone = 9999
)

// Wish is a wish list: the COS builds, drivers and flavours that have to be
// published. Every kernel is combined with every driver and every flavour.
type Wish struct {
	// Version of the format: 1.
	Version int `json:"version" jsonschema:"enum=1"`
	// ImageMap is the URL (https://, gs:// or file://) of a list of released images in the form of
	// https://www.gstatic.com/gke-image-maps/gke-to-cos.json. The list has the milestones of unknown BUILD_IDs, and
	// decides which builds count as `released`. Optional.
	ImageMap string `json:"imageMap,omitempty"`
	// Boards for which kernels are wanted. Default: lakitu. It cannot be combined with architectures.
	Boards []string `json:"boards,omitempty" jsonschema:"minItems=1,uniqueItems=true,example=lakitu,example=lakitu-arm64"`
	// Architectures is another way to name COS's own boards: amd64 is lakitu, arm64 is lakitu-arm64.
	Architectures []target.Arch `json:"architectures,omitempty" jsonschema:"minItems=1,uniqueItems=true"`
	// Kernels that are wanted: an exact build, or the newest ones, of a milestone or of all.
	Kernels []Kernel `json:"kernels" jsonschema:"minItems=1"`
	// Drivers that are wanted for each kernel: a version, a branch such as R535, default or latest. COS publishes with
	// each build which version is its default, its latest, and the newest of each branch. default@NVIDIA_L4 is the version
	// that COS names for that type of GPU.
	Drivers []Driver `json:"drivers" jsonschema:"minItems=1"`
	// Flavours that are wanted of each driver. Default: proprietary and open. If a release lacks a
	// flavour, the builder reports the cell as unavailable. That is no failure.
	Flavours []target.Flavour `json:"flavours,omitempty" jsonschema:"minItems=1,uniqueItems=true"`
	// Exclude lists cells that are left out.
	Exclude []Exclude `json:"exclude,omitempty"`
}

// Kernel names kernels: one by `build`, or the newest ones by `latest`, of one `milestone` or of all.
type Kernel struct {
	// Build is an exact BUILD_ID, such as 17800.66.78.
	Build string `json:"build,omitempty" jsonschema:"pattern=^[0-9]{1\\,9}\\.[0-9]{1\\,9}\\.[0-9]{1\\,9}$"`
	// Milestone of the builds, such as 109. It needs latest.
	Milestone int `json:"milestone,omitempty" jsonschema:"minimum=60,maximum=9999"`
	// Latest is the number of newest builds that are wanted, for each board.
	Latest int `json:"latest,omitempty" jsonschema:"minimum=1,maximum=1000"`
	// Board for this entry only, such as lakitu-arm64.
	Board string `json:"board,omitempty"`
	// Released counts only builds that the image map lists, because a release bucket also has builds that never became
	// an image. It needs latest and imageMap.
	Released bool `json:"released,omitempty"`
	// EarlyWarning is for milestones that are not released yet. Failures of these kernels are reported, but do not change
	// the exit code.
	EarlyWarning bool `json:"earlyWarning,omitempty"`
}

// Driver is one wish for a driver. The file has a word (default, latest, R535, 535.261.03), or a mapping with `version`
// or `branch`.
type Driver struct {
	// Wish is default, latest, a branch or a version.
	Wish target.Wish
	// Flavours applies to this driver only; nil means the wish list's flavours. A flavour that is named here and does not
	// exist is a failure.
	Flavours []target.Flavour
	// Labels are the labels that this driver gets in buckets.
	Labels []string
}

// DriverForm is the mapping form of a [Driver], for the schema.
type DriverForm struct {
	// Version is NVIDIA's version, such as 535.261.03, or 535.261.03-grid if the bucket has that edition.
	Version string `json:"version,omitempty"`
	// Branch such as R535 stands for the version that COS names for this branch.
	Branch string `json:"branch,omitempty" jsonschema:"pattern=^R[0-9]{3\\,4}$"`
	// Flavours of this driver only. A flavour that is named here and that the release lacks is a failure.
	Flavours []target.Flavour `json:"flavours,omitempty" jsonschema:"minItems=1,uniqueItems=true"`
	// Labels by which COS's own installer finds this driver in buckets: DEFAULT, LATEST, or its branch. The driver's open
	// flavour gets them. If no driver of this file has a label, the label goes to the version to which COS gives it.
	Labels []string `json:"labels,omitempty" jsonschema:"minItems=1,uniqueItems=true"`
}

// Exclude leaves out each cell that matches all fields of the entry.
type Exclude struct {
	// Build is an exact BUILD_ID.
	Build string `json:"build,omitempty"`
	// Milestone of the build.
	Milestone int `json:"milestone,omitempty"`
	// Board such as lakitu-arm64.
	Board string `json:"board,omitempty"`
	// Driver is a version or a branch such as R535.
	Driver string `json:"driver,omitempty"`
	// Flavour is proprietary or open.
	Flavour target.Flavour `json:"flavour,omitempty"`
	// Reason says why. Only people read it.
	Reason string `json:"reason,omitempty"`

	line int
}

// boards returns the boards of the wish list, or the default board if the wish list has none.
func (w *Wish) boards() []string {
	switch {
	case len(w.Boards) > 0:
		return w.Boards
	case len(w.Architectures) == 0:
		return []string{"lakitu"}
	}
	var all []string
	for _, a := range w.Architectures {
		if a == target.ARM64 {
			all = append(all, "lakitu-arm64")
		} else {
			all = append(all, "lakitu")
		}
	}
	return all
}
