package agent

import (
	"context"
	"io"
	"log/slog"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/fetcher/internal/devnode"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
)

// Repository is the part of a registry or an OCI layout folder that the agent uses.
type Repository interface {
	Name() string
	Manifest(ctx context.Context, digest string) ([]byte, error)
	Blob(ctx context.Context, digest string, size int64) (io.ReadCloser, error)
	// Small reads a whole blob, and compares it with its digest.
	Small(ctx context.Context, d v1.Descriptor) ([]byte, error)
	// AttachedIf returns the signed statements that are attached to an artifact, and checks their digests. The function
	// useful returns a name for a useful statement, and "" for any other. Of several statements with the same name, only
	// the first counts. Statements whose annotations match the argument wanted come first (see
	// registry.Repository.AttachedIf).
	AttachedIf(
		ctx context.Context,
		digest, artifactType string,
		useful func([]byte) string,
		wanted ...map[string]string,
	) ([][]byte, error)
	// Payloads returns the descriptors of attachments of a type, without reading the attachments. It leaves out
	// attachments with more bytes than the argument most.
	Payloads(
		ctx context.Context,
		digest, artifactType string,
		most int64,
		wanted ...map[string]string,
	) ([]v1.Descriptor, error)
}

// Verifier verifies signed statements. Package trust has the only real implementation.
type Verifier interface {
	Verify(bundles [][]byte, e trust.Expect) (*trust.Verdict, error)
	// Statement checks the signature of one statement.
	Statement(bundle []byte) (*trust.Statement, error)
	// Wanted returns annotations by which a registry can find the statements that the verifier needs for a kernel.
	Wanted(k target.Kernel) []map[string]string
}

type prober interface {
	// Probe asks the NVML library at this path inside the node's root. If persist is true, it turns persistence mode on.
	Probe(ctx context.Context, library string, persist bool) (gpucheck.NVML, error)
}

// localBuilder compiles on the node when no artifact is published.
type localBuilder interface {
	Build(ctx context.Context, q resolve.Question) (resolve.Answer, error)
}

// Config has the settings of the node's owner.
type Config struct {
	// InstallDir is the install folder's path inside the node's root.
	InstallDir string
	Wish       target.Wish
	// Pin is the digest of the one wanted artifact; "" means any artifact that matches the wish.
	Pin string
	// Flavour is auto, proprietary or open.
	Flavour string
	// Wait is the longest time to wait for a build or a failing service.
	Wait time.Duration
	// ModuleParams has the parameter string of each module, by the module's name.
	ModuleParams map[string]string
	// NoLoad means that the driver becomes active on the disk, but that no module is loaded.
	NoLoad bool
	// ReplaceForeign permits the agent to unload a foreign driver; otherwise that driver stays. AllowDowngrade accepts an
	// older driver than the installed one if the wish is not for an exact version. Retry tries drivers again that failed
	// too often, crashed the node, or were rolled back by hand.
	ReplaceForeign, AllowDowngrade, Retry bool
	// Maintenance is the time window for replacing a loaded driver. WaitIdle is how long to wait for programs that use the
	// driver.
	Maintenance Window
	WaitIdle    time.Duration
	// Persistence keeps GPUs initialised while no program uses them.
	Persistence bool
	// EditBoot changes a kernel command line that prevents the load of modules, and reboots the node.
	EditBoot bool
	// DryRun changes nothing and reports the planned actions.
	DryRun bool
}

// Parts are the interfaces and services that the agent uses. All are required except Refresh, Local, Boot, Tried and
// Free.
type Parts struct {
	Finder resolve.Finder
	Open   func(ref string) (Repository, error)
	// Verifier is for published artifacts. NodeVerifier returns the verifier for artifacts that this node compiled itself.
	Verifier     Verifier
	NodeVerifier func() (Verifier, error)
	// Refresh fetches the signed list that Verifier reads. The agent calls it before it verifies a published artifact. The
	// agent only logs an error of Refresh, because Verifier decides whether a missing list matters. Refresh is nil if
	// there is no list.
	Refresh func(ctx context.Context) error
	// Local is nil when the node must not compile.
	Local localBuilder
	// Node is the node's root.
	Node   *noderoot.Root
	Kernel kmod.System
	Nodes  devnode.System
	Probe  prober
	// Boot changes the boot configuration; nil means that changes are forbidden.
	Boot bootMaker
	// Tried receives a report on each driver that was loaded or failed to load. It must not block. nil means that nobody
	// wants these reports.
	Tried func(api.NodeReport)
	Log   *slog.Logger
	Line  *timeline.Run
	// Now is the clock.
	Now func() time.Time
	// Free returns the number of free bytes on the disk of the install folder; nil means that the disk is asked.
	Free func() (int64, error)
}

func (p Parts) free(store *install.Store) (int64, error) {
	if p.Free != nil {
		return p.Free()
	}
	return store.Free()
}
