// Package api is the wire: the types that server, builder and fetcher exchange
// over HTTP and through the queue, and a typed client. It refuses to hold any
// rule; rules live in the component that owns them.
package api

import (
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// State is the state of a cell of the matrix.
type State string

// The states of a cell. A build has the subset queued, building, published,
// failed and cancelled.
const (
	Published   State = "published"   // an artifact exists
	Building    State = "building"    // a builder works on it
	Queued      State = "queued"      // waits for a builder
	Failed      State = "failed"      // the last build failed; Class says how
	Cancelled   State = "cancelled"   // the last build was called off
	Unsupported State = "unsupported" // can never be built; Reason says why
	Yanked      State = "yanked"      // was published and must not be used any more
	Quarantined State = "quarantined" // was published and did not load on several nodes
	Unknown     State = "unknown"     // not requested yet
)

// Withdrawn reports whether an artifact of this state exists and nobody should have it:
// not from elsewhere, and not compiled anew.
func (s State) Withdrawn() bool { return s == Yanked || s == Quarantined }

// Kernel is a kernel of the catalogue.
type Kernel struct {
	target.Kernel
	// Fingerprint is empty until a builder has read the kernel's headers.
	Fingerprint target.Fingerprint `json:"fingerprint,omitempty"`
	// Default, Latest and Branches are what this COS build's own lists say of
	// drivers: gpu_default_version, gpu_latest_version, gpu_driver_versions.
	Default  string            `json:"default,omitempty"`
	Latest   string            `json:"latest,omitempty"`
	Branches map[string]string `json:"branches,omitempty"`
	// GPUs are what gpu_driver_versions says of the types of GPU that it has a list for, by
	// COS's name for the type, such as NVIDIA_L4.
	GPUs map[string]GPUDrivers `json:"gpus,omitempty"`
	// GKE are the versions of GKE whose nodes boot this kernel, newest first, by the list
	// of images that the server follows.
	GKE    []string  `json:"gke,omitempty"`
	SeenAt time.Time `json:"seenAt"`
	// FirstSeenAt is when the catalogue first recorded the kernel.
	FirstSeenAt time.Time `json:"firstSeenAt"`
}

// GPUDrivers are the driver versions that a COS build names for a type of GPU.
type GPUDrivers struct {
	// Default and Latest are "" where COS names none.
	Default string `json:"default,omitempty"`
	Latest  string `json:"latest,omitempty"`
	// Branches maps a branch, such as R535, to its version.
	Branches map[string]string `json:"branches,omitempty"`
}

// DriverRelease is a driver version of the catalogue.
type DriverRelease struct {
	Version string `json:"version"`
	Branch  string `json:"branch"`
	// Flavours are those known to be in the release; empty is not known yet.
	Flavours []target.Flavour `json:"flavours,omitempty"`
	SeenAt   time.Time        `json:"seenAt"`
}

// Artifact is a published artifact. One artifact serves every kernel of its
// fingerprint.
type Artifact struct {
	Digest      string             `json:"digest"`
	Repository  string             `json:"repository"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	Driver      target.Driver      `json:"driver"`
	Arch        target.Arch        `json:"arch"`
	Release     string             `json:"release"`
	// Kernels are the COS builds that the artifact is attested for.
	Kernels []target.Kernel `json:"kernels"`
	State   State           `json:"state"` // Published, Yanked or Quarantined
	Reason  string          `json:"reason,omitempty"`
	// Replacement is the digest of what to use in place of a yanked artifact.
	Replacement string    `json:"replacement,omitempty"`
	PublishedAt time.Time `json:"publishedAt"`
	// WithdrawnAt is since when the artifact is yanked or in quarantine.
	WithdrawnAt *time.Time `json:"withdrawnAt,omitempty"`
}

// NewArtifact tells the catalogue of an artifact that was published.
type NewArtifact struct {
	Digest string `json:"digest"`
	// Repository is HOST/NAME, or /NAME on the server itself; empty is where the
	// server's builders publish.
	Repository  string             `json:"repository,omitempty"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	Driver      target.Driver      `json:"driver"`
	Release     string             `json:"release,omitempty"`
	// Kernels are the COS builds that the artifact is attested for, all of one
	// architecture.
	Kernels []target.Kernel `json:"kernels"`
}

// MaxBuildLog bounds the log of one build: the server takes no more, and
// builders send the end of a longer one.
const MaxBuildLog = 64 << 20

// Bounds of the log of a running build: bytes that are kept, and bytes of one part.
const (
	MaxLiveLog     = 8 << 20
	MaxLiveLogPart = 256 << 10
)

// HeartbeatInterval is how often a builder tells the server that it works on a build. The
// server gives the build to another one when it gets no report for some of these.
const HeartbeatInterval = 10 * time.Second

// BuildRequest asks for a cell to be built.
type BuildRequest struct {
	BuildID string `json:"buildId"`
	Board   string `json:"board"`
	// Driver is a wish: default, latest, a branch or a version.
	Driver  string `json:"driver"`
	Flavour string `json:"flavour"`
}

// Build is one try to make one cell.
type Build struct {
	ID      int64         `json:"id"`
	Kernel  target.Kernel `json:"kernel"`
	Driver  target.Driver `json:"driver"`
	State   State         `json:"state"`
	Phase   string        `json:"phase,omitempty"`
	Worker  string        `json:"worker,omitempty"`
	Attempt int           `json:"attempt"`
	// Class is the kind of the failure with State failed; with queued it is
	// that of the try before, if there was one.
	Class string `json:"class,omitempty"`
	// Error is the first error line: for an API break the compiler's.
	Error  string           `json:"error,omitempty"`
	Hint   string           `json:"hint,omitempty"`
	Digest string           `json:"digest,omitempty"`
	Phases []timeline.Phase `json:"phases,omitempty"`
	// Priority is 1 for what somebody waits for, and higher for what can wait.
	Priority   int        `json:"priority"`
	CreatedAt  time.Time  `json:"createdAt"`
	StartedAt  *time.Time `json:"startedAt,omitempty"`
	FinishedAt *time.Time `json:"finishedAt,omitempty"`
	// HeartbeatAt is when the builder last said that it works on the build.
	HeartbeatAt *time.Time `json:"beatAt,omitempty"`
}

// BuildUpdate is what a builder reports of a build; zero fields leave the
// catalogue as it is.
type BuildUpdate struct {
	State       State              `json:"state,omitempty"`
	Worker      string             `json:"worker,omitempty"`
	Attempt     int                `json:"attempt,omitempty"`
	Phase       string             `json:"phase,omitempty"`
	Kernel      *target.Kernel     `json:"kernel,omitempty"`
	Fingerprint target.Fingerprint `json:"fingerprint,omitempty"`
	Class       string             `json:"class,omitempty"`
	Error       string             `json:"error,omitempty"`
	Hint        string             `json:"hint,omitempty"`
	Digest      string             `json:"digest,omitempty"`
	Repository  string             `json:"repository,omitempty"`
	Phases      []timeline.Phase   `json:"phases,omitempty"`
}

// Resolution answers "what should a node of this kernel run?".
type Resolution struct {
	Kernel target.Kernel `json:"kernel"`
	// Driver is the exact driver that the wish came to; empty when none fits.
	Driver target.Driver `json:"driver"`
	State  State         `json:"state"`
	// Repository and Digest name the artifact when State is published. A
	// Repository without a host (it starts with "/") is on the server itself.
	Repository string `json:"repository,omitempty"`
	Digest     string `json:"digest,omitempty"`
	// Replacement is the digest of what to use in place of the cell's yanked artifact.
	Replacement string `json:"replacement,omitempty"`
	// ReadyAt is when the artifact became usable for this kernel.
	ReadyAt *time.Time `json:"readyAt,omitempty"`
	// Position of a queued cell is 1 for the one that is built next. ETA is when an
	// open cell may be ready, by what such builds took lately. Both are about right.
	Position int        `json:"position,omitempty"`
	ETA      *time.Time `json:"eta,omitempty"`
	// Build is the newest build of the cell, where there is one.
	Build *Build `json:"build,omitempty"`
	// Reason and Hint are for people: why there is no artifact, and the next move.
	Reason string `json:"reason,omitempty"`
	Hint   string `json:"hint,omitempty"`
}

// WishList is what has to be built without anybody asking: the text is in the
// builder's own format, see builder wish schema.
type WishList struct {
	Name string `json:"name"`
	Text string `json:"text"`
	// Version counts the changes of the text, from 1.
	Version   int64     `json:"version"`
	ChangedAt time.Time `json:"changedAt"`
	// PlannedAt is when it was last compared with the catalogue, Cells how many
	// cells it came to, and Problems why some wishes came to none.
	PlannedAt *time.Time `json:"plannedAt,omitempty"`
	Cells     int        `json:"cells"`
	Problems  []string   `json:"problems,omitempty"`
}

// NewWishList is the body that stores a wish list.
type NewWishList struct {
	Text string `json:"text"`
	// Version is that of the text that this one takes the place of: when it is
	// another by now, nothing is stored. 0 takes the place of any.
	Version int64 `json:"version,omitempty"`
}

// ReleaseNote announces a COS build.
type ReleaseNote struct {
	BuildID string `json:"buildId"`
}

// Release is a COS build and what has happened to its cells.
type Release struct {
	BuildID string    `json:"buildId"`
	SeenAt  time.Time `json:"seenAt"`
	Kernels []Kernel  `json:"kernels"`
	// Cells that somebody asked for, wish lists among them; with each that is
	// published, when it became so.
	Cells []Resolution  `json:"cells"`
	Ready int           `json:"ready"`
	Open  int           `json:"open"`
	Times ReadyDuration `json:"times"`
}

// ReadyDuration tells how long it took from a kernel's being seen until its cells
// were ready, in seconds.
type ReadyDuration struct {
	Count int     `json:"count"`
	P50   float64 `json:"p50"`
	P90   float64 `json:"p90"`
	P99   float64 `json:"p99"`
	Max   float64 `json:"max"`
}

// Pool is a node pool that may move to a COS build, see [Client.Preflight].
type Pool struct {
	Name string `json:"name,omitempty"`
	// BuildID or GKE names the COS build; the other is empty. GKE is a version of GKE, such
	// as 1.33.5-gke.1080000: the build that its nodes boot.
	BuildID string `json:"buildId,omitempty"`
	GKE     string `json:"gke,omitempty"`
	Board   string `json:"board"`
	// Driver and Flavour as in a BuildRequest; empty is default and auto.
	Driver  string `json:"driver,omitempty"`
	Flavour string `json:"flavour,omitempty"`
}

// BuildOrGKE tells what names the build of a pool: a BUILD_ID, or a version of GKE, which
// has "-gke." in it.
func BuildOrGKE(name string) (buildID, gke string) {
	if strings.Contains(name, "-gke.") {
		return "", name
	}
	return name, ""
}

// PreflightRequest asks whether node pools may move.
type PreflightRequest struct {
	Pools []Pool `json:"pools"`
}

// Preflight is the answer: all pools may move, or some may not yet.
type Preflight struct {
	May   bool          `json:"may"`
	Pools []PoolVerdict `json:"pools"`
}

// PoolVerdict is the answer for one pool, in the order of the question.
type PoolVerdict struct {
	Pool Pool `json:"pool"`
	May  bool `json:"may"`
	// Resolution is what a node of the pool would be told.
	Resolution Resolution `json:"resolution"`
}

// Problem is the body of every answer that is an error (RFC 9457, media type
// application/problem+json), with two members of ours.
type Problem struct {
	Title  string     `json:"title"`
	Status int        `json:"status"`
	Detail string     `json:"detail,omitempty"`
	Kind   fault.Kind `json:"kind"`
	Hint   string     `json:"hint,omitempty"`
}

// BuildJob is a build as the queue carries it. Its River kind is fixed in
// [BuildJob.Kind].
type BuildJob struct {
	Build   int64  `json:"build" river:"unique"`
	BuildID string `json:"build_id"`
	Board   string `json:"board"`
	Driver  string `json:"driver"` // an exact version
	Flavour string `json:"flavour"`
	// KernelMirror and DriverMirror are where the inputs are; "" means the builder's own default.
	KernelMirror string `json:"kernel_mirror,omitempty"`
	DriverMirror string `json:"driver_mirror,omitempty"`
}

// Kind names the job to River.
func (BuildJob) Kind() string { return "build" }

// BuildQueue is the River queue that carries BuildJob.
const BuildQueue = "builds"
