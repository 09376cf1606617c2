// Package plan turns a wish list into cells. A wish list is a YAML file that a person maintains; it names the wanted
// COS builds, drivers and flavours. Parse reads the file and reports every mistake, with its line. Expand asks a bucket
// which builds and drivers exist. It returns one cell for each combination of build, driver version and flavour.
//
// Parse and Expand depend only on the file and the bucket's answers; only LoadImageMap opens a connection. The package
// refuses to guess. It reports a field that it does not know, a milestone that has no builds, and a driver that COS
// does not offer; it never skips them silently.
package plan

import (
	"github.com/prebake/prebake/pkg/target"
)

// FormatVersion is the version of the wish list's file format.
const FormatVersion = 1

// MaxFile bounds a wish list, in bytes.
const MaxFile = 1 << 20

// More bounds. They are far above the number of cells that a farm builds in a day.
const (
	maxLatest    = 1000   // builds that one entry may ask for
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
	// https://www.gstatic.com/gke-image-maps/gke-to-cos.json. It tells the milestones of BUILD_IDs
	// that the builder does not know, and what `released` means. Optional.
	ImageMap string `json:"imageMap,omitempty"`
	// Boards for which kernels are wanted. Default: lakitu. Leave it out where architectures is given.
	Boards []string `json:"boards,omitempty" jsonschema:"minItems=1,uniqueItems=true,example=lakitu,example=lakitu-arm64"`
	// Architectures is another way to name COS's own boards: amd64 is lakitu, arm64 is lakitu-arm64.
	Architectures []target.Arch `json:"architectures,omitempty" jsonschema:"minItems=1,uniqueItems=true"`
	// Kernels that are wanted: an exact build, or the newest ones, of a milestone or of all.
	Kernels []Kernel `json:"kernels" jsonschema:"minItems=1"`
	// Drivers that are wanted for each kernel: a version, a branch such as R535, default or latest. What
	// default, latest and a branch mean is what COS says for that very build; default@NVIDIA_L4 is what it says
	// for that type of GPU.
	Drivers []Driver `json:"drivers" jsonschema:"minItems=1"`
	// Flavours that are wanted of each driver. Default: proprietary and open. A release that does not have
	// one of them is reported as unavailable, which is no failure.
	Flavours []target.Flavour `json:"flavours,omitempty" jsonschema:"minItems=1,uniqueItems=true"`
	// Exclude lists cells that are not wanted after all.
	Exclude []Exclude `json:"exclude,omitempty"`
}

// Kernel is one wish for kernels: `build`, or `latest` with or without
// `milestone`.
type Kernel struct {
	// Build is an exact BUILD_ID, such as 17800.66.78.
	Build string `json:"build,omitempty" jsonschema:"pattern=^[0-9]{1\\,9}\\.[0-9]{1\\,9}\\.[0-9]{1\\,9}$"`
	// Milestone such as 109; it goes with latest.
	Milestone int `json:"milestone,omitempty" jsonschema:"minimum=60,maximum=9999"`
	// Latest is how many of the newest builds are wanted, of each board.
	Latest int `json:"latest,omitempty" jsonschema:"minimum=1,maximum=1000"`
	// Board for this entry only, such as lakitu-arm64.
	Board string `json:"board,omitempty"`
	// Released counts only builds that the image map lists: a release bucket also holds builds that
	// never became an image. It goes with latest, and needs imageMap.
	Released bool `json:"released,omitempty"`
	// EarlyWarning is for milestones that are not released yet: their failures are reported and do not
	// change the exit code.
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
	// Version is NVIDIA's, such as 535.261.03, or 535.261.03-grid where the bucket has that edition of it.
	Version string `json:"version,omitempty"`
	// Branch such as R535: the version that COS names for it.
	Branch string `json:"branch,omitempty" jsonschema:"pattern=^R[0-9]{3\\,4}$"`
	// Flavours of this driver only. One that the release does not have is a failure here.
	Flavours []target.Flavour `json:"flavours,omitempty" jsonschema:"minItems=1,uniqueItems=true"`
	// Labels by which COS's own installer finds this driver in buckets: DEFAULT, LATEST, or its branch.
	// They are the open flavour's. A label that no driver has here goes to the version to which COS gives it.
	Labels []string `json:"labels,omitempty" jsonschema:"minItems=1,uniqueItems=true"`
}

// Exclude takes out the cells for which all of its fields hold.
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
	// Reason is for the next reader of the file.
	Reason string `json:"reason,omitempty"`

	line int
}

// boards returns the boards that the wish list names, or the default.
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
