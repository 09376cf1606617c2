// Package agent brings a node to the driver that it should run, step by step:
// observe, resolve, verify, fetch, stage, install, load, validate. It refuses
// to give unverified bytes a final name, to touch a driver that is in use, and
// to leave a node worse than it was: when a step fails, what was in force
// before is in force again.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/fetcher/internal/devnode"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
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
	Attached(ctx context.Context, digest, artifactType string, wanted ...map[string]string) ([][]byte, error)
}

// Verifier judges signed statements; package trust has the one implementation.
type Verifier interface {
	Verify(bundles [][]byte, e trust.Expect) (*trust.Verdict, error)
}

type prober interface {
	// Probe asks the NVML library at this path inside the node's root.
	Probe(ctx context.Context, library string) (gpucheck.NVML, error)
}

// localBuilder compiles on the node when nothing is published.
type localBuilder interface {
	Build(ctx context.Context, q resolve.Question) (resolve.Answer, error)
	PublicKey() ([]byte, error)
}

// Config is what the node's owner decides.
type Config struct {
	// HostRoot is the folder that is the node's root.
	HostRoot string
	// InstallDir is the install folder's path inside the node's root.
	InstallDir string
	Wish       target.Wish
	// Flavour is auto, proprietary or open.
	Flavour string
	// Wait is the longest time to wait for a build or a failing service.
	Wait time.Duration
	// ModuleParams are parameter strings by module name.
	ModuleParams map[string]string
	// NoLoad stages and switches, and loads nothing.
	NoLoad bool
	// DryRun changes nothing and reports what would be done.
	DryRun bool
}

// Parts are what the agent works with. All are required but Local.
type Parts struct {
	Finder   resolve.Finder
	Open     func(ref string) (Repository, error)
	Verifier Verifier
	// Local is nil when the node must not compile.
	Local localBuilder
	// LocalVerifier trusts only the given public keys.
	LocalVerifier func(pem []byte) (Verifier, error)
	// Root is the file system below HostRoot.
	Root   fs.FS
	Kernel kmod.System
	Nodes  devnode.System
	Probe  prober
	Log    *slog.Logger
	Line   *timeline.Run
	// Now is the clock.
	Now func() time.Time
}

// Agent runs the steps on one node.
type Agent struct {
	cfg    Config
	parts  Parts
	loader *kmod.Loader
}

// New returns an agent.
func New(cfg Config, parts Parts) *Agent {
	return &Agent{cfg: cfg, parts: parts, loader: &kmod.Loader{System: parts.Kernel, Root: parts.Root}}
}

// Report is the result of one run.
type Report struct {
	Kernel target.Kernel  `json:"kernel"`
	Answer resolve.Answer `json:"resolution"`
	// SignedBy names the key or identity whose signature was accepted; empty when an
	// installed driver was kept without asking anybody.
	SignedBy string `json:"signedBy,omitempty"`
	// Changed says that another artifact is in force than before.
	Changed bool `json:"changed"`
	DryRun  bool `json:"dryRun,omitempty"`
	// Plan lists what was done, or with DryRun what would be done.
	Plan []string `json:"plan"`
	// FetchedBytes came over the network as layers; CachedBytes were there.
	FetchedBytes int64            `json:"fetchedBytes"`
	CachedBytes  int64            `json:"cachedBytes"`
	Modules      []kmod.Outcome   `json:"modules"`
	Verdict      gpucheck.Verdict `json:"verdict"`
	Phases       []timeline.Phase `json:"phases"`
}

func (r *Report) did(format string, args ...any) {
	r.Plan = append(r.Plan, fmt.Sprintf(format, args...))
}

// Run does all steps once. The report is never nil; it tells how far the run
// came. A verdict other than ready is an error of its kind.
func (a *Agent) Run(ctx context.Context) (*Report, error) {
	r := &Report{DryRun: a.cfg.DryRun, Plan: []string{}, Modules: []kmod.Outcome{}}
	err := a.run(ctx, r)
	r.Phases = a.parts.Line.Phases()
	return r, err
}

func (a *Agent) run(ctx context.Context, r *Report) (err error) {
	facts, err := a.observe(r)
	if err != nil {
		return err
	}
	store, err := a.openStore()
	if err != nil {
		return err
	}
	if store != nil {
		defer func() { err = errors.Join(err, store.Close()) }()
	}
	if !a.cfg.DryRun {
		unlock, lockErr := store.Lock(filepath.Join(a.cfg.HostRoot, googleLock))
		if lockErr != nil {
			return lockErr
		}
		defer func() { err = errors.Join(err, unlock()) }()
	}
	current, err := currentSet(store)
	if err != nil {
		return err
	}
	answer, err := a.resolve(ctx, facts, current)
	r.Answer = answer
	if err != nil {
		return err
	}
	set := current
	if answer.Source != keptInstalled {
		if set, err = a.bring(ctx, r, store, facts, current); err != nil {
			return err
		}
	}
	if a.cfg.DryRun {
		return a.planLoad(r, facts, set, current)
	}
	return a.activate(ctx, r, store, facts, set)
}

// googleLock is the lock file of Google's installer, inside the node's root.
const googleLock = "tmp/cos_gpu_installer_lock"

// keptInstalled is the source of an answer that nobody was asked for.
const keptInstalled = "installed"

func (a *Agent) observe(r *Report) (*host.Facts, error) {
	var facts *host.Facts
	err := a.parts.Line.Do("observe", func() (note string, err error) {
		if facts, err = host.Observe(a.parts.Root); err != nil {
			return "", err
		}
		r.Kernel = facts.Kernel
		return fmt.Sprintf("COS %s, %s, %s", facts.Kernel, facts.Kernel.Release, plural(len(facts.GPUs), "GPU")), nil
	})
	return facts, err
}

// openStore opens the install folder; with DryRun it may be missing (nil).
func (a *Agent) openStore() (*install.Store, error) {
	dir := filepath.Join(a.cfg.HostRoot, a.cfg.InstallDir)
	store, err := install.Open(dir, !a.cfg.DryRun)
	if a.cfg.DryRun && errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return store, err
}

func currentSet(store *install.Store) (*install.Set, error) {
	if store == nil {
		return nil, nil
	}
	return store.Current()
}

// resolve finds the artifact. When the service cannot be reached and what is
// installed already answers the wish, that stays: a node must come up without
// the farm.
func (a *Agent) resolve(ctx context.Context, facts *host.Facts, current *install.Set) (resolve.Answer, error) {
	q := resolve.Question{Kernel: facts.Kernel, Wish: a.cfg.Wish, Flavour: a.cfg.Flavour, GPUs: facts.Listed()}
	var answer resolve.Answer
	err := a.parts.Line.Do("resolve", func() (string, error) {
		say := func(text string) { a.parts.Line.Say("resolve", "%s", text) }
		var err error
		answer, err = resolve.Patience{Wait: a.cfg.Wait, Say: say}.Find(ctx, a.parts.Finder, q)
		switch {
		case fault.Is(err, fault.Transient) && serves(current, q):
			answer = keptAnswer(current)
			answer.Reason = err.Error()
			a.parts.Log.WarnContext(ctx, "kept installed driver", "driver", current.Driver, "digest", current.Digest, "err", err)
			return fmt.Sprintf("%s kept: service not reachable", current.Driver), nil
		case err != nil:
			return "", err
		case answer.Err() == nil:
			return fmt.Sprintf("%s from %s", answer.Driver, answer.Source), nil
		case a.parts.Local == nil || answer.State == api.Yanked:
			return string(answer.State), answer.Err()
		case a.cfg.DryRun:
			return string(answer.State) + "; would compile on this node", answer.Err()
		}
		return string(answer.State) + "; compiling on this node", nil
	})
	if err != nil || answer.Err() == nil {
		return answer, err
	}
	err = a.parts.Line.Do("build", func() (string, error) {
		if answer.Driver.Flavour != "" && q.Flavour == resolve.Auto {
			q.Flavour = string(answer.Driver.Flavour)
		}
		built, err := a.parts.Local.Build(ctx, q)
		if err != nil {
			return "", err
		}
		answer = built
		return fmt.Sprintf("%s compiled on this node", built.Driver), nil
	})
	return answer, err
}

// serves reports whether the installed set answers the question.
func serves(s *install.Set, q resolve.Question) bool {
	if s == nil || s.Kernel.BuildID != q.Kernel.BuildID || s.Kernel.Board != q.Kernel.Board || s.Kernel.Release != q.Kernel.Release {
		return false
	}
	if v, exact := q.Wish.Exact(); exact && v != s.Driver.Version {
		return false
	}
	// A branch means no edition of a release: these are asked for by their names.
	if b, named := q.Wish.BranchName(); named && (b != s.Driver.Branch() || s.Driver != s.Driver.Modules()) {
		return false
	}
	return q.Flavour == resolve.Auto || q.Flavour == string(s.Driver.Flavour)
}

func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// size writes bytes for people.
func size(n int64) string {
	switch {
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d B", n)
}

func short(digest string) string {
	return digest[:min(len(digest), len("sha256:")+12)]
}

func kernelName(module string) string { return strings.ReplaceAll(module, "-", "_") }
