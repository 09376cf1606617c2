// Package pipeline builds and publishes the artifact of one cell, one kernel with one driver. It runs these phases, and
// reports each of them: source, look up, compile (or take modules), sign modules, check, load test, package, sign,
// publish. If every destination already has an artifact of the cell, signed with our key, the pipeline compiles
// nothing. It then only attests that the artifact fits the COS build.
//
// run.go calls the phases in their order. Each phase is in the file with the phase's name. There are two exceptions:
// the phase sign modules is in modsign.go, and take modules is in google.go.
//
// The package never publishes anything that failed a phase. Other packages do the work of the phases.
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
	// LoadTestAuto runs the load test if the bucket has a bootable kernel and the kernel's modules that the driver needs.
	LoadTestAuto LoadTest = "auto"
	// LoadTestRequire fails the build if the load test cannot run.
	LoadTestRequire LoadTest = "require"
	// LoadTestOff publishes after the static checks alone.
	LoadTestOff LoadTest = "off"
)

const (
	defaultCompileTimeout = 45 * time.Minute
	defaultMinFree        = 1 << 30
	defaultRenewAfter     = 30 * 24 * time.Hour
)

// Config has the settings of one machine for all its builds.
type Config struct {
	// KernelMirror and DriverMirror are bucket URLs: gs://, https:// or file://.
	KernelMirror, DriverMirror string
	// Cache is the content-addressed cache that all builds share.
	Cache *cas.Cache
	// Destinations are where the build publishes. A registry reference or an oci: layout folder gets the artifact. A gs://
	// or file:// bucket gets the tarball.
	Destinations []string
	// Registry returns the settings for one of the Destinations, because a registry must never see the credentials for
	// another. Nil means the Docker configuration for all.
	Registry func(destination string) registry.Options
	// Licence decides which destination may get which flavour.
	Licence licence.Rule
	// Key says where the signing key is: the path of a private key file, a KMS URI, or [sign.PrefixKeyless] and the path
	// of a file. [sign.LoadSigner] reads it with KeyOptions.
	Key        string
	KeyOptions []sign.Option
	// ModuleKey signs the modules for the kernel. It is the path of an RSA key file or a KMS URI; "" means no key of our
	// own. ModuleCert is the path of the file with the key's certificate.
	ModuleKey, ModuleCert string
	// GoogleSignatures decides about Google's module signatures; "" means GoogleAuto.
	GoogleSignatures GoogleSignatures
	// GoogleModules publishes the open modules that Google compiled and signed for the COS build, unchanged. The build
	// verifies them with ModuleCert. If ModuleCert is "", the build uses trusted_key.pem in the bucket, the certificate
	// with which the kernel was built.
	GoogleModules bool
	// DebugSymbols publishes the modules' debug information as a referrer of the artifact. The artifact stays the same.
	DebugSymbols bool
	// RebuildAfter is the age at which a published artifact is built again, so that it gets a new provenance. Such a
	// build is called a renewal. 0 means that a published artifact is reused at any age. If no provenance by Key
	// contains the time of the build, the artifact counts as old.
	RebuildAfter time.Duration
	// RetrySince decides which stored failures of renewals count. If a renewal failed, or a destination refused it, the
	// next renewals of the artifact end before the compile for some time. A failure before RetrySince is ignored.
	RetrySince time.Time
	// Fresh is the cache for the products of renewals (see RebuildAfter). A renewal reuses nothing that an earlier pass
	// made. [OpenFresh] makes this cache for one pass. If Fresh is nil, each renewal makes an empty cache of its own.
	Fresh *cas.Cache
	// BTF gives the modules BTF, a description of their types for tracers, if the kernel accepts it. It needs the bucket's
	// vmlinux and the program pahole. It changes the artifact's fingerprint.
	BTF bool
	// WithRunfile copies NVIDIA's runfile into buckets, for installers that take user space from there.
	WithRunfile bool
	// Labels are set for the driver in buckets, in addition to COS's labels. Only the open flavour gets labels. If
	// LabelsLater is true, the build sets no labels; the caller sets them after several builds.
	Labels      []string
	LabelsLater bool
	// Deltas is the maximum number of deltas for an artifact; see [publish.Deltas]. 0 means no deltas.
	Deltas int
	// BuilderID is the URI that names the builder in the provenance and in a bucket's index. Version is the version of
	// this program.
	BuilderID, Version string
	// Jobs is the number of jobs that `make` runs at once (-j); 0 means one for each processor.
	Jobs     int
	LoadTest LoadTest
	// GuestInit and NVMLProbe are paths of programs for the load test's virtual machine.
	GuestInit, NVMLProbe string
	// MinFree is the space in bytes that must be free on the cache's disk before a compile. 0 means 1 GiB, which is enough
	// for the largest driver.
	MinFree int64
	// CompileTimeout is the maximum time of a compile; 0 means 45 minutes.
	CompileTimeout time.Duration
	// Compiling limits the number of cells that compile at the same time, each with Jobs compilers. Nil means no limit.
	// The other phases have no limit, because they keep about one processor busy.
	Compiling *semaphore.Weighted
}

// Request says which cell to build, and replaces some settings for this build.
type Request struct {
	BuildID, Board string
	Driver         target.Wish
	Flavour        target.Flavour
	// KernelMirror, DriverMirror and GoogleSignatures replace the Config's fields if they are not "".
	KernelMirror, DriverMirror string
	GoogleSignatures           GoogleSignatures
	// GoogleModules is like Config.GoogleModules. It is enough if one of the two is true.
	GoogleModules bool
	// BTF is a version of pahole; "" means no request for BTF. The modules get BTF as with Config.BTF. The build fails if
	// this machine has another version of pahole.
	BTF string
	// PackRecipe is the recipe for the layers, see [bundle.PackLayerAs]. "" means the recipe of the published artifact; a
	// new artifact gets [bundle.PackRecipe].
	PackRecipe string
}

// Result is the outcome of a build.
type Result struct {
	Kernel      target.Kernel      `json:"kernel"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	Driver      target.Driver      `json:"driver"`
	Digest      string             `json:"digest"`
	// Repositories are the repositories that have the artifact, in the order of Config.Destinations. The buckets are in
	// Tarballs.
	Repositories []string `json:"repositories"`
	Tag          string   `json:"tag"`
	// Existed is true if every destination had this artifact before the build.
	Existed bool `json:"existed"`
	// Reused is true if the build reused a published artifact, and so compiled, tested and packed nothing.
	Reused   bool              `json:"reused,omitempty"`
	LoadTest *loadtest.Verdict `json:"loadTest,omitempty"`
	Layers   []bundle.Layer    `json:"layers,omitempty"`
	// Symbols is the digest of the debug symbols, if Config.DebugSymbols asked for them.
	Symbols string `json:"symbols,omitempty"`
	// Deltas are the published deltas. With a delta, a node makes the module layer from the layer of an earlier COS build.
	Deltas []publish.Delta `json:"deltas,omitempty"`
	// Tarballs are the published tarballs, one for each bucket.
	Tarballs []tarball.Report `json:"twins,omitempty"`
	// Labels are the labels of this COS build in each bucket.
	Labels []tarball.Labelled `json:"labels,omitempty"`
	// Renewal is true if the build is a renewal (see Config.RebuildAfter). Remembered is true if a renewal ended before
	// the compile, because an earlier renewal of the same artifact failed.
	Renewal    bool             `json:"-"`
	Remembered bool             `json:"-"`
	Phases     []timeline.Phase `json:"phases"`
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
