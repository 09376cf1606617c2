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
	// AttachedIf returns the signed statements of an artifact, after a check of their digests (see
	// registry.Repository.AttachedIf). The callback useful returns a name for a statement, or "" for a useless one. Only
	// the first statement of a name counts. Statements with the wanted annotations come first.
	AttachedIf(
		ctx context.Context,
		digest, artifactType string,
		useful func([]byte) string,
		wanted ...map[string]string,
	) ([][]byte, error)
	// Payloads returns the descriptors of attachments of one type, without reading them. It skips attachments above the
	// given maximum of bytes.
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
	// Wanted returns the annotations of the statements that the verifier needs for a kernel.
	Wanted(k target.Kernel) []map[string]string
}

type prober interface {
	// Probe asks the NVML library at this path in the node's root. If persist is true, it turns persistence mode on.
	Probe(ctx context.Context, library string, persist bool) (gpucheck.NVML, error)
}

type cudaProber interface {
	// AskCUDA calls cuInit of the CUDA library at this path in the node's root. [gpucheck.ErrHung] means that the call did
	// not return in time, or that an earlier probe still runs. Any other error means that there is no result, such as
	// when the library does not open or the probe crashes.
	AskCUDA(ctx context.Context, library string) (gpucheck.CUDA, error)
}

// localBuilder compiles on the node when no artifact is published.
type localBuilder interface {
	// Build compiles a driver. After a success, the caller must call release when it no longer needs the artifact. A
	// second call of release does nothing. Before the first call, Build of another fetcher on this node returns an error
	// of kind Busy.
	Build(ctx context.Context, q resolve.Question) (answer resolve.Answer, release func() error, err error)
}

// Config has the settings of the node's owner.
type Config struct {
	// InstallDir is the install folder's path inside the node's root.
	InstallDir string
	Wish       target.Wish
	// Pin is the digest of the only wanted artifact, or "" for any that matches the wish.
	Pin string
	// Flavour is auto, proprietary or open.
	Flavour string
	// Wait is the longest time to wait for a build or a failing service.
	Wait time.Duration
	// ModuleParams has the parameter string of each module, by the module's name.
	ModuleParams map[string]string
	// NoLoad means that the driver becomes active on the disk, but that no module is loaded.
	NoLoad bool
	// ReplaceForeign permits the unload of a foreign driver. AllowDowngrade accepts an older driver even if the wish is
	// not for an exact version. Retry tries drivers again that failed too often, crashed the node, or were rolled back by
	// hand.
	ReplaceForeign, AllowDowngrade, Retry bool
	// Maintenance is the time window for replacing a loaded driver. WaitIdle is the maximum wait for programs that use it.
	Maintenance Window
	WaitIdle    time.Duration
	// Persistence keeps GPUs initialised while no program uses them.
	Persistence bool
	// EditBoot permits a change of the kernel command line and a reboot, if the kernel refuses modules.
	EditBoot bool
	// NoCUDA turns off the call of cuInit: the driver is ready once NVML lists every GPU as healthy.
	NoCUDA bool
	// DryRun changes nothing and reports the planned actions.
	DryRun bool
}

// Parts are the interfaces and services that the agent uses. All are required except Registries, Reread, Refresh,
// Local, CUDA, Boot, Tried and Free.
type Parts struct {
	Finder resolve.Finder
	Open   func(ref string) (Repository, error)
	// Registries are references of more repositories. If the agent cannot read an artifact from the repository that the
	// Finder's answer names, it tries these, in this order.
	Registries []string
	// Verifier is for published artifacts. NodeVerifier returns the verifier for artifacts that this node compiled itself.
	Verifier     Verifier
	NodeVerifier func() (Verifier, error)
	// Reread reads the keys and the policy of Verifier again. A run begins with it, and Monitor calls it now and then. nil
	// means that they never change. Its errors are only logged: the keys and the policy that Verifier has stay valid.
	Reread func() error
	// Refresh fetches the signed list that Verifier reads; nil means no list. Its errors are only logged, because Verifier
	// decides whether a missing list matters.
	Refresh func(ctx context.Context) error
	// Local is nil when the node must not compile.
	Local localBuilder
	// Node is the node's root.
	Node   *noderoot.Root
	Kernel kmod.System
	Nodes  devnode.System
	Probe  prober
	// CUDA is nil when the agent does not call cuInit.
	CUDA cudaProber
	// Boot changes the boot configuration. nil forbids changes.
	Boot bootMaker
	// Tried receives a report on each driver that was loaded or failed to load. It must not block, and may be nil.
	Tried func(api.NodeReport)
	Log   *slog.Logger
	Line  *timeline.Run
	// Now is the clock.
	Now func() time.Time
	// Free returns the number of free bytes on the disk of the install folder; nil means that the agent asks the file
	// system.
	Free func() (int64, error)
}

func (p Parts) free(store *install.Store) (int64, error) {
	if p.Free != nil {
		return p.Free()
	}
	return store.Free()
}
