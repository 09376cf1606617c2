package agent

import (
	"context"
	"io"
	"log/slog"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/fetcher/internal/devnode"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
)

// Repository is what the agent asks of a registry or an OCI layout folder.
type Repository interface {
	Name() string
	Manifest(ctx context.Context, digest string) ([]byte, error)
	Blob(ctx context.Context, digest string, size int64) (io.ReadCloser, error)
	// Small reads a whole blob and Attached whole signatures, those that have one
	// of the wanted sets of annotations first, both compared with their digests.
	Small(ctx context.Context, d v1.Descriptor) ([]byte, error)
	// AttachedIf also has what is useful first.
	AttachedIf(
		ctx context.Context,
		digest, artifactType string,
		useful func([]byte) string,
		wanted ...map[string]string,
	) ([][]byte, error)
	// Payloads tells what is attached, and reads none of it.
	Payloads(
		ctx context.Context,
		digest, artifactType string,
		most int64,
		wanted ...map[string]string,
	) ([]v1.Descriptor, error)
}

// Verifier judges signed statements; package trust has the one implementation.
type Verifier interface {
	Verify(bundles [][]byte, e trust.Expect) (*trust.Verdict, error)
	// Statement checks the signature of one.
	Statement(bundle []byte) (*trust.Statement, error)
	// Wanted returns the annotations of those that decide for a kernel.
	Wanted(k target.Kernel) []map[string]string
}

type prober interface {
	// Probe asks the NVML library at this path inside the node's root, and with persist
	// turns persistence mode on.
	Probe(ctx context.Context, library string, persist bool) (gpucheck.NVML, error)
}

// localBuilder compiles on the node when nothing is published.
type localBuilder interface {
	Build(ctx context.Context, q resolve.Question) (resolve.Answer, error)
}

// Config is what the node's owner decides.
type Config struct {
	// InstallDir is the install folder's path inside the node's root.
	InstallDir string
	Wish       target.Wish
	// Pin is the digest of the one artifact that is wanted; "" means any that answers the wish.
	Pin string
	// Flavour is auto, proprietary or open.
	Flavour string
	// Wait is the longest time to wait for a build or a failing service.
	Wait time.Duration
	// ModuleParams are parameter strings by module name.
	ModuleParams map[string]string
	// NoLoad stages and switches, and loads nothing.
	NoLoad bool
	// ReplaceForeign lets a driver go that somebody else loaded; without it that one
	// stays. AllowDowngrade takes an older driver than the installed one for a wish that
	// names no version. Retry tries again what failed too often, took the node down, or
	// was rolled back by hand.
	ReplaceForeign, AllowDowngrade, Retry bool
	// Maintenance says when a driver that is loaded may be replaced, and WaitIdle how long
	// to wait for those who use it to end.
	Maintenance Window
	WaitIdle    time.Duration
	// Persistence keeps GPUs initialised while nobody uses them.
	Persistence bool
	// EditBoot changes a kernel command line that keeps modules out, and reboots the node.
	EditBoot bool
	// DryRun changes nothing and reports what would be done.
	DryRun bool
}

// Parts are what the agent works with. All are required but Refresh, Local, Boot and Tried.
type Parts struct {
	Finder resolve.Finder
	Open   func(ref string) (Repository, error)
	// Verifier judges what is published, and NodeVerifier what this node compiled for
	// itself.
	Verifier     Verifier
	NodeVerifier func() (Verifier, error)
	// Refresh updates what Verifier depends on, before something published is judged.
	// What it could not do Verifier knows; nil means nothing to do.
	Refresh func(ctx context.Context) error
	// Local is nil when the node must not compile.
	Local localBuilder
	// Node is the node's root.
	Node   *noderoot.Root
	Kernel kmod.System
	Nodes  devnode.System
	Probe  prober
	// Boot changes the boot configuration; nil where nothing may.
	Boot bootMaker
	// Tried is told what happened to each artifact that was loaded. It must not wait; nil means nobody.
	Tried func(api.NodeReport)
	Log   *slog.Logger
	Line  *timeline.Run
	// Now is the clock.
	Now func() time.Time
}
