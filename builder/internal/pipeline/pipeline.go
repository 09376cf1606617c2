// Package pipeline makes one cell of the matrix: it takes a COS build and a
// driver wish through source, look up, compile, check, load test, package, sign
// and publish, and reports every phase. `builder build`, `builder work` and a
// node's local compile all run this one path. A cell that every destination
// has already, signed with our key, is attested and not compiled again.
//
// It refuses to publish anything that failed a phase, and to know how a phase
// does its work; each has a package of its own.
package pipeline

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"time"

	"golang.org/x/sync/semaphore"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/loadtest"
	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/twin"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
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
	defaultRoom           = 1 << 30
)

// Config is what one machine brings to every build.
type Config struct {
	// KernelMirror and DriverMirror are bucket URLs: gs://, https:// or file://.
	KernelMirror, DriverMirror string
	// Cache is the content-addressed cache that builds share.
	Cache *cas.Cache
	// Destinations are registry references or oci: layout folders, which get the
	// artifact, and gs:// or file:// buckets, which get its tarball twin.
	Destinations []string
	// Registry returns the settings for one of the Destinations: credentials
	// belong to one registry and are never shown to another. Nil is the Docker
	// configuration for all.
	Registry func(destination string) registry.Options
	// Key is a private key file, a KMS URI, or none, as [sign.LoadSigner] takes it
	// with KeyOptions.
	Key        string
	KeyOptions []sign.Option
	// ModuleKey is an RSA key file or a KMS URI with which the modules are signed
	// for the kernel, and ModuleCert its certificate; "" leaves them unsigned.
	ModuleKey, ModuleCert string
	// GoogleSignatures says what to do with Google's; "" is GoogleAuto.
	GoogleSignatures GoogleSignatures
	// GoogleModules publishes the open modules that Google compiled and signed
	// for the COS build, untouched. They are held against the certificate that
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
	// They are the open flavour's. LabelsLater leaves all labels to whoever knows
	// more than one cell.
	Labels      []string
	LabelsLater bool
	// BuilderID goes into the provenance as builder.id, a URI, and is who gives
	// labels; Version is this program's.
	BuilderID, Version string
	// Jobs is make's -j; 0 is one for each processor.
	Jobs     int
	LoadTest LoadTest
	// Tools are programs that the load test puts into its machine.
	GuestInit, NVMLProbe string
	// Room is how much of the cache's disk has to be free before a compile, in
	// bytes; 0 is 1 GiB, which holds the sources, objects and modules of the
	// largest driver.
	Room int64
	// CompileTimeout bounds the compile phase; 0 is 45 minutes.
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
	// are told under Twins.
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
	// Twins are the tarballs in buckets.
	Twins []twin.Report `json:"twins,omitempty"`
	// Labels are those of this COS build in each bucket.
	Labels []twin.Labelled  `json:"labels,omitempty"`
	Phases []timeline.Phase `json:"phases"`
}

type run struct {
	cfg  Config
	req  Request
	log  io.Writer
	line *timeline.Run
	res  Result

	// products is where everything that is made goes: Config.Cache, but for Make.
	products *cas.Cache

	kernel  *cossrc.Inputs
	release *nvsrc.Release
	modules map[string]string // name to path
	sums    map[string]string // name to SHA-256, in hex
	inputs  []string          // folders that this run compiled from; none where the modules were there

	debugDir string // with Config.DebugSymbols
	host     string // digest of the host's programs that builds run
	pahole   string // its version; "" where the modules get no BTF
	boot     boot   // of the load test
	untested string // why there was none, though it was not off
	id       bundle.Identity
	started  time.Time

	moduleSigner *modsign.Signer // nil without Config.ModuleKey
	moduleHash   string
	forced       bool              // the kernel takes signed modules only
	google       *googleSignatures // nil where there are none, or none is wanted
	prebuilt     *googleModules    // nil without Config.GoogleModules

	signer   *sign.Signer
	verifier *trust.Verifier
	places   []place
	buckets  []*twin.Bucket
	gpus     *gpulist.List     // nil where the release has no list
	said     map[string]string // the labels that COS gives, where they are asked for
	ahead    *ahead
	image    v1.Image
	bundles  [][]byte // the signed statements

	copy      *logCopy
	packedLog []byte
}

// withDefaults returns the settings for one request.
func (c Config) withDefaults(req Request) Config {
	c.KernelMirror, c.DriverMirror = cmp.Or(req.KernelMirror, c.KernelMirror), cmp.Or(req.DriverMirror, c.DriverMirror)
	c.GoogleModules = c.GoogleModules || req.GoogleModules
	c.GoogleSignatures = cmp.Or(req.GoogleSignatures, c.GoogleSignatures, GoogleAuto)
	c.BTF = c.BTF || req.BTF != ""
	c.CompileTimeout, c.Room = cmp.Or(c.CompileTimeout, defaultCompileTimeout), cmp.Or(c.Room, defaultRoom)
	return c
}

// Run makes one cell. log gets everything that tools print. The Result is
// returned with an error too, as far as it came.
func Run(ctx context.Context, cfg Config, req Request, log io.Writer, line *timeline.Run) (*Result, error) {
	cfg = cfg.withDefaults(req)
	if cfg.Registry == nil {
		cfg.Registry = func(string) registry.Options { return registry.Options{} }
	}
	r := &run{cfg: cfg, req: req, line: line, started: time.Now().UTC(), products: cfg.Cache}
	defer cfg.Cache.Begin()() // what this build uses stays until it ends
	kept, err := newLogCopy(cfg.Cache)
	if err != nil {
		return &r.res, fault.CacheDisk(fmt.Errorf("keep the log: %w", err))
	}
	defer func() { _ = kept.close() }() // a scratch file; the next Open removes it as well
	r.copy, r.log = kept, io.MultiWriter(log, kept)
	err = r.all(ctx)
	_ = r.closeBuckets() // every write to them was closed, and told, by itself
	if err != nil {
		fmt.Fprintf(log, "\nbuild failed (%v): %v\n", fault.Of(err), err)
	}
	r.res.Phases = line.Phases()
	return &r.res, err
}

type phase struct {
	name string
	when func(*run) bool
	do   func(context.Context) (string, error)
}

func always(*run) bool    { return true }
func making(r *run) bool  { return !r.res.Reused }
func signing(r *run) bool { return making(r) && (r.moduleSigner != nil || r.google != nil) }

func compiling(r *run) bool { return making(r) && r.prebuilt == nil }
func taking(r *run) bool    { return making(r) && r.prebuilt != nil }

func (r *run) all(ctx context.Context) error {
	defer func() { r.ahead.end() }()
	return r.each(ctx, []phase{
		{"source", always, r.source},
		{"look up", always, r.lookUp},
		{"compile", compiling, func(ctx context.Context) (string, error) {
			r.ahead = r.packAhead(ctx) // needs nothing of the modules
			return r.compile(ctx)
		}},
		{"take modules", taking, r.takeModules},
		{"sign modules", signing, r.signModules},
		{"check", making, r.check},
		{"load test", making, r.loadTest},
		{"package", making, r.pack},
		{"sign", making, r.sign},
		{"publish", always, r.publish},
	})
}

func (r *run) each(ctx context.Context, phases []phase) error {
	for _, phase := range phases {
		if !phase.when(r) {
			continue
		}
		fmt.Fprintf(r.log, "\n== %s\n", phase.name)
		if err := r.line.Do(phase.name, func() (string, error) { return phase.do(ctx) }); err != nil {
			return fmt.Errorf("%s: %w", phase.name, err)
		}
	}
	return nil
}

func (r *run) say(phase string) func(string) {
	return func(text string) {
		fmt.Fprintln(r.log, text)
		r.line.Say(phase, "%s", text)
	}
}

// source fetches and checks every input, and settles the driver version.
func (r *run) source(ctx context.Context) (string, error) {
	kernels, err := cosbucket.Open(ctx, r.cfg.KernelMirror)
	if err != nil {
		return "", err
	}
	defer kernels.Close()
	drivers, err := cosbucket.Open(ctx, r.cfg.DriverMirror)
	if err != nil {
		return "", err
	}
	defer drivers.Close()
	if r.kernel, err = cossrc.Fetch(ctx, kernels, r.cfg.Cache, r.req.BuildID, r.req.Board, r.say("source"), r.cfg.KernelOptions()...); err != nil {
		return "", err
	}
	if err := r.findPahole(ctx); err != nil {
		return "", err
	}
	r.res.Kernel, r.res.Fingerprint = r.kernel.Kernel, r.kernel.Fingerprint
	if r.host, err = sandbox.HostTools(); err != nil {
		return "", err
	}
	version, ok := r.req.Driver.Exact()
	if !ok {
		list, err := kernels.Drivers(ctx, r.kernel.Kernel)
		if err != nil {
			return "", err
		}
		if version, err = list.Choose(r.req.Driver); err != nil {
			return "", err
		}
	}
	r.res.Driver = target.Driver{Version: version, Flavour: r.req.Flavour}
	if err := r.askLabels(ctx, kernels); err != nil {
		return "", err
	}
	if r.release, err = nvsrc.Fetch(ctx, drivers, r.cfg.Cache, version, r.kernel.Kernel.Arch, r.say("source")); err != nil {
		return "", err
	}
	if _, err := r.release.Source(r.req.Flavour); err != nil {
		return "", err
	}
	if err := r.fetchSignatures(ctx, kernels); err != nil {
		return "", err
	}
	if err := r.fetchModules(ctx, kernels); err != nil {
		return "", err
	}
	return fmt.Sprintf("kernel %s, ABI %s", r.kernel.Kernel.Release, r.kernel.Fingerprint.Short()), nil
}

// key names a cached product of this cell: everything that decides its bytes.
func (r *run) key(parts ...string) string {
	if r.pahole != "" {
		parts = append(parts, FactBTF, r.pahole)
	}
	h := sha256.New()
	for _, p := range append(parts, r.host, r.release.SourceDigest, string(r.res.Driver.Flavour)) {
		fmt.Fprintf(h, "%d:%s\n", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))
}
