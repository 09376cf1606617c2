// Package pipeline makes the artifact of one cell, that is of one COS build with one driver, and
// publishes it. It goes through these phases, and reports each of them: source, look up, compile (or
// take modules), sign modules, check, load test, package, sign, publish. `builder build`, `builder
// work` and a node's local compile all use this package. If every destination already has an artifact
// of the cell, signed with our key, the pipeline compiles nothing: it only attests that the artifact
// fits the COS build.
//
// run.go calls the phases in their order. The file of a phase has the phase's name. google.go deals
// with modules that Google signed. Each phase returns a value that later phases use.
//
// The package refuses to publish anything that failed a phase. It does not know how a phase does
// its work: that is in other packages.
package pipeline

import (
	"cmp"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/prebake/prebake/builder/internal/licence"
	"github.com/prebake/prebake/builder/internal/loadtest"
	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// LoadTest is the mode of the load test.
type LoadTest string

// The load test's modes.
const (
	// LoadTestAuto runs the load test if the bucket has a bootable kernel, and those modules of the
	// kernel that the driver needs.
	LoadTestAuto LoadTest = "auto"
	// LoadTestRequire fails the build if the load test cannot run.
	LoadTestRequire LoadTest = "require"
	// LoadTestOff publishes after the static checks alone.
	LoadTestOff LoadTest = "off"
)

const (
	defaultCompileTimeout = 45 * time.Minute
	defaultMinFree        = 1 << 30
)

// Config is the settings of one machine for all its builds.
type Config struct {
	// KernelMirror and DriverMirror are bucket URLs: gs://, https:// or file://.
	KernelMirror, DriverMirror string
	// Cache is the content-addressed cache that all builds share.
	Cache *cas.Cache
	// Destinations are where the build publishes. A registry reference, or an oci: layout folder,
	// gets the artifact. A gs:// or file:// bucket gets the tarball.
	Destinations []string
	// Registry returns the settings for one of the Destinations. It is a function because one
	// registry must never see the credentials for another. Nil means the Docker configuration for
	// all.
	Registry func(destination string) registry.Options
	// Licence is the rule that says which destination may get which flavour.
	Licence licence.Rule
	// Key says where the signing key is, in the form that [sign.LoadSigner] reads: the path of a
	// private key file, a KMS URI, or keyless: with the path of a file. KeyOptions are the options
	// for LoadSigner.
	Key        string
	KeyOptions []sign.Option
	// ModuleKey is the path of an RSA key file or a KMS URI. This key signs the modules for the
	// kernel. ModuleCert is the path of the file with the key's certificate. If ModuleKey is "", no
	// own key signs the modules.
	ModuleKey, ModuleCert string
	// GoogleSignatures decides what the build does with Google's module signatures; "" means
	// GoogleAuto.
	GoogleSignatures GoogleSignatures
	// GoogleModules publishes the open modules that Google compiled and signed for the COS build,
	// unchanged. The build verifies them with ModuleCert. If ModuleCert is "", it verifies them with
	// trusted_key.pem in the bucket, the certificate with which the kernel was built.
	GoogleModules bool
	// DebugSymbols publishes the modules' debug information as a referrer of the artifact. The
	// compile takes longer, and the artifact stays the same.
	DebugSymbols bool
	// BTF gives the modules BTF, a description of their types for tracers, if the kernel accepts
	// it. BTF needs the bucket's vmlinux and the program pahole. An artifact with BTF has another
	// fingerprint than the artifact without.
	BTF bool
	// WithRunfile copies NVIDIA's runfile into buckets, for installers that take user space from a
	// bucket.
	WithRunfile bool
	// Labels are set for the driver in buckets, in addition to the labels that COS gives it. Only
	// the open flavour gets labels. If LabelsLater is true, the build sets no labels: the caller
	// sets them after several builds, because labels depend on more than one cell.
	Labels      []string
	LabelsLater bool
	// Deltas is the largest number of deltas that an artifact gets, see [publish.Deltas]. 0 means
	// none.
	Deltas int
	// BuilderID is a URI. It is the builder.id of the provenance, and the builder that set the labels
	// in a bucket's index. Version is the version of this program.
	BuilderID, Version string
	// Jobs is make's -j; 0 means one for each processor.
	Jobs     int
	LoadTest LoadTest
	// GuestInit and NVMLProbe are paths of programs that the load test copies into its virtual
	// machine.
	GuestInit, NVMLProbe string
	// MinFree is the space in bytes that must be free on the cache's disk before a compile. 0 means
	// 1 GiB, which is enough for sources, objects and modules of the largest driver.
	MinFree int64
	// CompileTimeout is the longest time that a compile may take; 0 means 45 minutes.
	CompileTimeout time.Duration
	// Compiling is the limit for the number of cells that compile at the same time, each with Jobs
	// compilers. Nil means no limit. The limit is only for the compile phase: the other phases keep
	// about one processor busy, so they may run next to another cell's compile.
	Compiling *semaphore.Weighted
}

// Request is the request to make one cell.
type Request struct {
	BuildID, Board string
	Driver         target.Wish
	Flavour        target.Flavour
	// Each of KernelMirror, DriverMirror and GoogleSignatures replaces the Config's field of the
	// same name, if it is not "".
	KernelMirror, DriverMirror string
	GoogleSignatures           GoogleSignatures
	// GoogleModules has the same meaning as Config.GoogleModules. It is enough if one of the two is true.
	GoogleModules bool
	// BTF is a version of pahole. If BTF is not "", the modules get BTF as with Config.BTF, and the
	// build fails if this machine has another version of pahole.
	BTF string
}

// Result is the outcome of a build.
type Result struct {
	Kernel      target.Kernel      `json:"kernel"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	Driver      target.Driver      `json:"driver"`
	Digest      string             `json:"digest"`
	// Repositories are the repositories that hold the artifact, in the order of
	// Config.Destinations. Destinations that are buckets are in Tarballs instead.
	Repositories []string `json:"repositories"`
	Tag          string   `json:"tag"`
	// Existed is true if every destination had this artifact before the build.
	Existed bool `json:"existed"`
	// Reused is true if the build reused a published artifact. Then the build compiled, tested and
	// packed nothing.
	Reused   bool              `json:"reused,omitempty"`
	LoadTest *loadtest.Verdict `json:"loadTest,omitempty"`
	Layers   []bundle.Layer    `json:"layers,omitempty"`
	// Symbols is the digest of the debug symbols, if Config.DebugSymbols asked for them.
	Symbols string `json:"symbols,omitempty"`
	// Deltas are the published deltas. With each delta, a node makes this artifact's module layer
	// from the module layer of an earlier COS build.
	Deltas []publish.Delta `json:"deltas,omitempty"`
	// Tarballs are the published tarballs, one for each bucket.
	Tarballs []tarball.Report `json:"twins,omitempty"`
	// Labels are the labels of this COS build in each bucket.
	Labels []tarball.Labelled `json:"labels,omitempty"`
	Phases []timeline.Phase   `json:"phases"`
}

// withDefaults returns the settings for one request, with defaults filled in.
func (c Config) withDefaults(req Request) Config {
	c.KernelMirror, c.DriverMirror = cmp.Or(req.KernelMirror, c.KernelMirror), cmp.Or(req.DriverMirror, c.DriverMirror)
	c.GoogleModules = c.GoogleModules || req.GoogleModules
	c.GoogleSignatures = cmp.Or(req.GoogleSignatures, c.GoogleSignatures, GoogleAuto)
	c.BTF = c.BTF || req.BTF != ""
	c.CompileTimeout, c.MinFree = cmp.Or(c.CompileTimeout, defaultCompileTimeout), cmp.Or(c.MinFree, defaultMinFree)
	return c
}
