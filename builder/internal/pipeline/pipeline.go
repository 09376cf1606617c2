// Package pipeline makes one cell of the matrix: it takes a COS build and a
// driver wish through source, look up, compile (or take modules), sign modules,
// check, load test, package, sign and publish, and reports every phase. `builder
// build`, `builder work` and a node's local compile all run this one path. A cell that
// every destination has already, signed with our key, is attested and not compiled
// again.
//
// run.go has the phases in their order, each with a file of its name; modules that
// Google signed are in google.go. What a phase makes is a value that the next ones
// take.
//
// It refuses to publish anything that failed a phase, and to know how a phase
// does its work; each has a package of its own.
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

// LoadTest says what to do about the load test.
type LoadTest string

// The load test's modes.
const (
	// LoadTestAuto runs it where the mirror has a bootable kernel, with the modules
	// that the driver needs.
	LoadTestAuto LoadTest = "auto"
	// LoadTestRequire fails the build where it cannot run.
	LoadTestRequire LoadTest = "require"
	// LoadTestOff publishes on static checks alone.
	LoadTestOff LoadTest = "off"
)

const (
	defaultCompileTimeout = 45 * time.Minute
	defaultMinFree        = 1 << 30
)

// Config is what one machine provides to every build.
type Config struct {
	// KernelMirror and DriverMirror are bucket URLs: gs://, https:// or file://.
	KernelMirror, DriverMirror string
	// Cache is the content-addressed cache that builds share.
	Cache *cas.Cache
	// Destinations are registry references or oci: layout folders, which get the
	// artifact, and gs:// or file:// buckets, which get its tarball.
	Destinations []string
	// Registry returns the settings for one of the Destinations: credentials
	// belong to one registry and are never shown to another. Nil is the Docker
	// configuration for all.
	Registry func(destination string) registry.Options
	// Licence says which destinations may have what.
	Licence licence.Rule
	// Key is a private key file, a KMS URI, or none, as [sign.LoadSigner] takes it
	// with KeyOptions.
	Key        string
	KeyOptions []sign.Option
	// ModuleKey is an RSA key file or a KMS URI with which the modules are signed
	// for the kernel, and ModuleCert its certificate; "" leaves them unsigned.
	ModuleKey, ModuleCert string
	// GoogleSignatures says what to do with Google's; "" means GoogleAuto.
	GoogleSignatures GoogleSignatures
	// GoogleModules publishes the open modules that Google compiled and signed
	// for the COS build, untouched. They are checked against the certificate that
	// the bucket says the kernel was built with, or against ModuleCert.
	GoogleModules bool
	// DebugSymbols publishes the modules' debug information beside the artifact.
	// It makes the compile dearer, and changes nothing in the artifact.
	DebugSymbols bool
	// BTF gives the modules a description of their types, for tracers, where the
	// kernel takes one. It needs the bucket's vmlinux and pahole, and makes other
	// artifacts, with fingerprints of their own.
	BTF bool
	// WithRunfile copies NVIDIA's runfile into buckets, for installers that get
	// their user space there.
	WithRunfile bool
	// Labels are given to the driver in buckets, besides those that COS gives it.
	// They are the open flavour's. LabelsLater leaves all labels to the caller that knows
	// more than one cell.
	Labels      []string
	LabelsLater bool
	// Deltas is how many deltas an artifact gets: see [publish.Deltas].
	Deltas int
	// BuilderID goes into the provenance as builder.id, a URI, and is who gives
	// labels; Version is this program's.
	BuilderID, Version string
	// Jobs is make's -j; 0 means one for each processor.
	Jobs     int
	LoadTest LoadTest
	// Tools are programs that the load test puts into its machine.
	GuestInit, NVMLProbe string
	// MinFree is how much of the cache's disk has to be free before a compile, in
	// bytes; 0 means 1 GiB, which holds the sources, objects and modules of the
	// largest driver.
	MinFree int64
	// CompileTimeout bounds the compile phase; 0 means 45 minutes.
	CompileTimeout time.Duration
	// Compiling bounds how many cells compile at a time, each with Jobs compilers;
	// nil bounds nothing. What comes before and after a compile keeps about one
	// processor busy, and goes on beside the next cell's.
	Compiling *semaphore.Weighted
}

// Request names one cell.
type Request struct {
	BuildID, Board string
	Driver         target.Wish
	Flavour        target.Flavour
	// KernelMirror, DriverMirror and GoogleSignatures replace the Config's where
	// set.
	KernelMirror, DriverMirror string
	GoogleSignatures           GoogleSignatures
	// GoogleModules asks for them whatever the Config says.
	GoogleModules bool
	// BTF asks for BTF as Config.BTF does, and for this very version of pahole.
	BTF string
}

// Result is what a build came to.
type Result struct {
	Kernel      target.Kernel      `json:"kernel"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	Driver      target.Driver      `json:"driver"`
	Digest      string             `json:"digest"`
	// Repositories hold the artifact, in the order of Config.Destinations. Buckets
	// are listed in Tarballs.
	Repositories []string `json:"repositories"`
	Tag          string   `json:"tag"`
	// Existed says that every destination already had this very artifact.
	Existed bool `json:"existed"`
	// Reused says that nothing was compiled, tested or packed for that reason.
	Reused   bool              `json:"reused,omitempty"`
	LoadTest *loadtest.Verdict `json:"loadTest,omitempty"`
	Layers   []bundle.Layer    `json:"layers,omitempty"`
	// Symbols is the digest of the debug symbols, where they were wanted.
	Symbols string `json:"symbols,omitempty"`
	// Deltas make the module layer out of those of earlier builds.
	Deltas []publish.Delta `json:"deltas,omitempty"`
	// Tarballs are the tarballs in buckets.
	Tarballs []tarball.Report `json:"twins,omitempty"`
	// Labels are those of this COS build in each bucket.
	Labels []tarball.Labelled `json:"labels,omitempty"`
	Phases []timeline.Phase   `json:"phases"`
}

// withDefaults returns the settings for one request.
func (c Config) withDefaults(req Request) Config {
	c.KernelMirror, c.DriverMirror = cmp.Or(req.KernelMirror, c.KernelMirror), cmp.Or(req.DriverMirror, c.DriverMirror)
	c.GoogleModules = c.GoogleModules || req.GoogleModules
	c.GoogleSignatures = cmp.Or(req.GoogleSignatures, c.GoogleSignatures, GoogleAuto)
	c.BTF = c.BTF || req.BTF != ""
	c.CompileTimeout, c.MinFree = cmp.Or(c.CompileTimeout, defaultCompileTimeout), cmp.Or(c.MinFree, defaultMinFree)
	return c
}
