// Package api defines the types that server, builder and fetcher exchange over HTTP and through the queue, and a typed
// client. It implements no rules: each rule is in the component that owns it.
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

// The states of a cell. A build can only be queued, building, published, failed or cancelled.
const (
	Published   State = "published"   // an artifact exists
	Building    State = "building"    // a builder works on it
	Queued      State = "queued"      // a build waits for a builder
	Failed      State = "failed"      // the last build failed; see Build.Class
	Cancelled   State = "cancelled"   // the last build was cancelled
	Unsupported State = "unsupported" // the cell can never be built; see Resolution.Reason
	Yanked      State = "yanked"      // an artifact exists, but an operator yanked it
	Quarantined State = "quarantined" // an artifact exists, but it did not load on several nodes
	Unknown     State = "unknown"     // nobody has requested a build of the cell, or the kernel is not known
)

// Withdrawn reports whether an artifact exists but must not be used. A node must then neither fetch the artifact
// elsewhere nor compile the driver itself.
func (s State) Withdrawn() bool { return s == Yanked || s == Quarantined }

// Kernel is a kernel of the catalogue.
type Kernel struct {
	target.Kernel
	// Fingerprint is empty until a builder has read the kernel's headers.
	Fingerprint target.Fingerprint `json:"fingerprint,omitempty"`
	// Default, Latest and Branches are driver versions from the files gpu_default_version, gpu_latest_version and
	// gpu_driver_versions of the COS build.
	Default  string            `json:"default,omitempty"`
	Latest   string            `json:"latest,omitempty"`
	Branches map[string]string `json:"branches,omitempty"`
	// GPUs has the versions that gpu_driver_versions lists for individual GPU types. The key is COS's name of the type,
	// such as NVIDIA_L4.
	GPUs map[string]GPUDrivers `json:"gpus,omitempty"`
	// GKE lists the GKE versions whose nodes boot this kernel, newest first.
	GKE    []string  `json:"gke,omitempty"`
	SeenAt time.Time `json:"seenAt"`
	// FirstSeenAt is when the catalogue first recorded the kernel.
	FirstSeenAt time.Time `json:"firstSeenAt"`
}

// GPUDrivers are the driver versions that a COS build lists for one GPU type.
type GPUDrivers struct {
	// Default and Latest are "" if COS lists no such version.
	Default string `json:"default,omitempty"`
	Latest  string `json:"latest,omitempty"`
	// Branches maps a branch, such as R535, to its version.
	Branches map[string]string `json:"branches,omitempty"`
}

// DriverRelease is a driver version that the catalogue lists.
type DriverRelease struct {
	Version string `json:"version"`
	Branch  string `json:"branch"`
	// Flavours are the flavours that the release is known to have. If empty, they are not known yet.
	Flavours []target.Flavour `json:"flavours,omitempty"`
	SeenAt   time.Time        `json:"seenAt"`
}

// Artifact is a published artifact. One artifact serves every kernel that has its fingerprint.
type Artifact struct {
	Digest      string             `json:"digest"`
	Repository  string             `json:"repository"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	Driver      target.Driver      `json:"driver"`
	Arch        target.Arch        `json:"arch"`
	Release     string             `json:"release"`
	// Kernels are the COS builds that have a kernel-match attestation for the artifact.
	Kernels []target.Kernel `json:"kernels"`
	State   State           `json:"state"` // Published, Yanked or Quarantined
	Reason  string          `json:"reason,omitempty"`
	// Replacement is the digest of the artifact to use in place of a yanked one.
	Replacement string    `json:"replacement,omitempty"`
	PublishedAt time.Time `json:"publishedAt"`
	// WithdrawnAt is the time at which the artifact was yanked or put in quarantine.
	WithdrawnAt *time.Time `json:"withdrawnAt,omitempty"`
}

// NewArtifact is the body of a request that adds a published artifact to the catalogue.
type NewArtifact struct {
	Digest string `json:"digest"`
	// Repository is HOST/NAME, or /NAME for a repository on the server itself. "" means the repository to which the
	// server's builders publish.
	Repository  string             `json:"repository,omitempty"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	Driver      target.Driver      `json:"driver"`
	Release     string             `json:"release,omitempty"`
	// Kernels are the COS builds with a kernel-match attestation for the artifact. All must have one architecture.
	Kernels []target.Kernel `json:"kernels"`
}

// MaxBuildLog is the maximum size in bytes of the log of one build. Builders send only the end of a longer log.
const MaxBuildLog = 64 << 20

// Bounds on the log of a running build, in bytes.
const (
	MaxLiveLog     = 8 << 20   // greatest size of the log that the server keeps
	MaxLiveLogPart = 256 << 10 // greatest size of one part that a builder appends
)

// HeartbeatInterval is the time between two reports of a builder on a build. If several reports in a row are missing,
// the server gives the build to another builder.
const HeartbeatInterval = 10 * time.Second

// BuildRequest is the body of a request to build a cell.
type BuildRequest struct {
	BuildID string `json:"buildId"`
	Board   string `json:"board"`
	// Driver is a wish: default, latest, a branch or a version.
	Driver  string `json:"driver"`
	Flavour string `json:"flavour"`
}

// Build is one attempt to build one cell.
type Build struct {
	ID      int64         `json:"id"`
	Kernel  target.Kernel `json:"kernel"`
	Driver  target.Driver `json:"driver"`
	State   State         `json:"state"`
	Phase   string        `json:"phase,omitempty"`
	Worker  string        `json:"worker,omitempty"`
	Attempt int           `json:"attempt"`
	// Class is the kind of the failure if State is failed. If State is queued, it is the kind of the previous attempt's
	// failure, or "". A newer builder may report a kind that package fault of this program lacks.
	Class string `json:"class,omitempty"`
	// Error is the first line of the error message.
	Error  string           `json:"error,omitempty"`
	Hint   string           `json:"hint,omitempty"`
	Digest string           `json:"digest,omitempty"`
	Phases []timeline.Phase `json:"phases,omitempty"`
	// Priority is 1 if a node or a person waits for the build. Builds that can wait have higher numbers.
	Priority int `json:"priority"`
	// Tries counts the builds of the cell in a row. It is 1 for a build that somebody requested, and for the first build
	// that the server queues by itself. Each further build that the server queues by itself after a failure adds 1. The
	// server queues no build after the 30th.
	Tries      int        `json:"tries,omitempty"`
	CreatedAt  time.Time  `json:"createdAt"`
	StartedAt  *time.Time `json:"startedAt,omitempty"`
	FinishedAt *time.Time `json:"finishedAt,omitempty"`
	// HeartbeatAt is the time of the builder's last report that it works on the build.
	HeartbeatAt *time.Time `json:"beatAt,omitempty"`
	// LogRemovedAt is the time at which the server last removed a log of the build to save space.
	LogRemovedAt *time.Time `json:"logRemovedAt,omitempty"`
}

// BuildUpdate is a builder's report about a build. A field with its zero value changes nothing.
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

// Resolution says which driver a node with this kernel should run, and whether the driver's artifact is published.
type Resolution struct {
	Kernel target.Kernel `json:"kernel"`
	// Driver is the exact driver that the requested wish stands for; empty if no driver fits.
	Driver target.Driver `json:"driver"`
	State  State         `json:"state"`
	// Repository and Digest identify the artifact if State is published. A Repository that begins with "/" is on the
	// server itself.
	Repository string `json:"repository,omitempty"`
	Digest     string `json:"digest,omitempty"`
	// Replacement is the digest of the artifact to use in place of the cell's yanked artifact.
	Replacement string `json:"replacement,omitempty"`
	// ReadyAt is the time at which the artifact became usable for this kernel.
	ReadyAt *time.Time `json:"readyAt,omitempty"`
	// Position is the place of a queued cell in the queue; 1 is the next one. ETA is the expected time at which a queued
	// or building cell is ready. Position and ETA are estimates.
	Position int        `json:"position,omitempty"`
	ETA      *time.Time `json:"eta,omitempty"`
	// Build is the newest build of the cell; nil if there is none.
	Build *Build `json:"build,omitempty"`
	// Reason tells people why there is no artifact, and Hint tells them what to do next.
	Reason string `json:"reason,omitempty"`
	Hint   string `json:"hint,omitempty"`
}

// WishList is a stored wish list, in the builder's format. "builder wish schema" prints its schema.
type WishList struct {
	Name string `json:"name"`
	Text string `json:"text"`
	// Version is 1 for the first text. Each change of the text adds 1.
	Version   int64     `json:"version"`
	ChangedAt time.Time `json:"changedAt"`
	// PlannedAt is the time at which the server last compared the list with the catalogue. Cells is the number of cells
	// that the wishes stand for. Problems says why some wishes stand for no cell.
	PlannedAt *time.Time `json:"plannedAt,omitempty"`
	Cells     int        `json:"cells"`
	Problems  []string   `json:"problems,omitempty"`
}

// NewWishList is the body of a request that stores a wish list.
type NewWishList struct {
	Text string `json:"text"`
	// Version is the version of the text to replace. If the stored text has another version, the server stores nothing. 0
	// replaces any version.
	Version int64 `json:"version,omitempty"`
}

// ReleaseNote is the body of a request that announces a COS build to the server.
type ReleaseNote struct {
	BuildID string `json:"buildId"`
}

// Release is a COS build with the states of its cells.
type Release struct {
	BuildID string    `json:"buildId"`
	SeenAt  time.Time `json:"seenAt"`
	Kernels []Kernel  `json:"kernels"`
	// Cells are the cells that somebody or a wish list asked for. Ready is the number of published cells. Open is the
	// number of queued and building cells.
	Cells []Resolution  `json:"cells"`
	Ready int           `json:"ready"`
	Open  int           `json:"open"`
	Times ReadyDuration `json:"times"`
}

// ReadyDuration summarises how long cells took to become ready after the discovery of their kernel. Count is the number
// of cells. P50, P90 and P99 are percentiles, and Max is the longest time, all in seconds.
type ReadyDuration struct {
	Count int     `json:"count"`
	P50   float64 `json:"p50"`
	P90   float64 `json:"p90"`
	P99   float64 `json:"p99"`
	Max   float64 `json:"max"`
}

// Pool is a node pool that may move to another COS build; see [Client.Preflight].
type Pool struct {
	Name string `json:"name,omitempty"`
	// BuildID is the BUILD_ID of the COS build. GKE is a GKE version, such as 1.33.5-gke.1080000, and stands for the COS
	// build that its nodes boot. One of BuildID and GKE is empty.
	BuildID string `json:"buildId,omitempty"`
	GKE     string `json:"gke,omitempty"`
	Board   string `json:"board"`
	// Driver and Flavour are as in a BuildRequest. Empty means default for Driver, and auto for Flavour.
	Driver  string `json:"driver,omitempty"`
	Flavour string `json:"flavour,omitempty"`
}

// BuildOrGKE returns the given name as one of its two results; the other result is empty. A name with "-gke." in it is
// a GKE version. Any other name is a BUILD_ID.
func BuildOrGKE(name string) (buildID, gke string) {
	if strings.Contains(name, "-gke.") {
		return "", name
	}
	return name, ""
}

// PreflightRequest is the body of a request that asks whether node pools may move to other COS builds.
type PreflightRequest struct {
	Pools []Pool `json:"pools"`
}

// Preflight is the response to a PreflightRequest. May is true if all pools may move.
type Preflight struct {
	May   bool          `json:"may"`
	Pools []PoolVerdict `json:"pools"`
}

// PoolVerdict says whether one pool may move. The verdicts have the order of the request's pools.
type PoolVerdict struct {
	Pool Pool `json:"pool"`
	May  bool `json:"may"`
	// Resolution is the result that [Client.Resolve] would return for a node of the pool.
	Resolution Resolution `json:"resolution"`
}

// Problem is the body of every error response (RFC 9457, media type application/problem+json). Kind and Hint are
// Prebake's own members.
type Problem struct {
	Title  string     `json:"title"`
	Status int        `json:"status"`
	Detail string     `json:"detail,omitempty"`
	Kind   fault.Kind `json:"kind"`
	Hint   string     `json:"hint,omitempty"`
}

// BuildJob is a build in the queue: the argument of a River job.
type BuildJob struct {
	Build   int64  `json:"build" river:"unique"`
	BuildID string `json:"build_id"`
	Board   string `json:"board"`
	Driver  string `json:"driver"` // an exact version
	Flavour string `json:"flavour"`
	// KernelMirror and DriverMirror are the URLs of the buckets with the kernels' and the drivers' files. "" means the
	// builder's default.
	KernelMirror string `json:"kernel_mirror,omitempty"`
	DriverMirror string `json:"driver_mirror,omitempty"`
}

// Kind returns the name of this kind of job for River.
func (BuildJob) Kind() string { return "build" }

// BuildQueue is the name of the River queue for BuildJob.
const BuildQueue = "builds"
