package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/trust"
)

// maxModule bounds one module; the largest real one has 65 MB.
const maxModule = 512 << 20

// bring verifies the artifact that was resolved, fetches the layers that the
// node lacks and stages them as a set. Nothing is in force after it.
func (a *Agent) bring(ctx context.Context, r *Report, store *install.Store, facts *host.Facts, current *install.Set) (*install.Set, error) {
	repo, err := a.parts.Open(r.Answer.Repository)
	if err != nil {
		return nil, err
	}
	var content bundle.Content
	err = a.parts.Line.Do("verify", func() (string, error) {
		v, err := a.verifierFor(r.Answer.Source)
		if err != nil {
			return "", err
		}
		var verdict *trust.Verdict
		if content, verdict, err = verify(ctx, repo, v, r, facts); err != nil {
			return "", err
		}
		r.SignedBy = verdict.SignedBy()
		return fmt.Sprintf("%s signed by %s", short(r.Answer.Digest), r.SignedBy), nil
	})
	if err != nil {
		return nil, err
	}
	set := &install.Set{
		Digest: r.Answer.Digest, Repository: repo.Name(), Kernel: facts.Kernel, Driver: content.Identity.Driver, InstalledAt: a.parts.Now().UTC(),
	}
	for _, l := range content.Layers {
		set.Layers = append(set.Layers, install.Layer{Kind: l.Kind, Digest: l.Digest, DiffID: l.DiffID, Size: l.Size})
	}
	if a.cfg.DryRun {
		a.planBring(r, store, set, current)
		return set, nil
	}
	err = a.parts.Line.Do("fetch", func() (string, error) {
		if err := a.fetch(ctx, r, repo, store, set, content.Identity, facts); err != nil {
			return "", err
		}
		return fmt.Sprintf("%s, cached %s", size(r.FetchedBytes), size(r.CachedBytes)), nil
	})
	if err != nil {
		return nil, err
	}
	err = a.parts.Line.Do("stage", func() (string, error) {
		if current != nil && current.Digest == set.Digest && current.Kernel == set.Kernel {
			*set = *current
			return "already staged", nil
		}
		if set.Modules == nil { // the modules layer was there already
			layer, err := store.LayerFS(content.Layer(bundle.LayerModules).Digest)
			if err != nil {
				return "", err
			}
			if set.Modules, err = inspect(layer, content.Identity, facts); err != nil {
				return "", err
			}
		}
		if err := store.AddSet(*set); err != nil {
			return "", err
		}
		return plural(len(set.Modules), "module") + " checked", nil
	})
	return set, err
}

// verifierFor returns who judges an artifact: the node's own key counts for
// what the node itself compiled, and for nothing else.
func (a *Agent) verifierFor(source string) (Verifier, error) {
	if source != "local" {
		return a.parts.Verifier, nil
	}
	pem, err := a.parts.Local.PublicKey()
	if err != nil {
		return nil, err
	}
	return a.parts.LocalVerifier(pem)
}

// verify reads the manifest, the config and the signed statements, and no
// layer. The statements are compared with the node as the node sees itself.
func verify(ctx context.Context, repo Repository, v Verifier, r *Report, facts *host.Facts) (bundle.Content, *trust.Verdict, error) {
	none := bundle.Content{}
	manifest, err := repo.Manifest(ctx, r.Answer.Digest)
	if err != nil {
		return none, nil, err
	}
	if got := digestOf(manifest); got != r.Answer.Digest {
		return none, nil, fault.New(fault.Unverified, fmt.Sprintf("read manifest %s: the bytes have digest %s", r.Answer.Digest, got), "fetch from another registry")
	}
	d, err := bundle.ConfigDescriptor(manifest)
	if err != nil {
		return none, nil, err
	}
	config, err := repo.Small(ctx, d)
	if err != nil {
		return none, nil, err
	}
	content, err := bundle.ParseManifest(manifest, config) // compares the config's digest
	if err != nil {
		return none, nil, err
	}
	bundles, err := repo.Attached(ctx, r.Answer.Digest, trust.ArtifactTypeBundle, trust.Wanted(facts.Kernel)...)
	if err != nil {
		return none, nil, err
	}
	verdict, err := v.Verify(bundles, trust.Expect{Digest: r.Answer.Digest, Kernel: facts.Kernel, Driver: r.Answer.Driver, Identity: content.Identity})
	switch {
	case fault.Hint(err) != "":
	case fault.Is(err, fault.Mismatch):
		err = fault.Wrap(fault.Mismatch, err, "have the driver built for COS "+facts.Kernel.String()+", and check that --server or --registry is the right one")
	case fault.Is(err, fault.Unverified):
		err = fault.Wrap(fault.Unverified, err, "use nothing of this artifact; publish it again, or fetch from another registry")
	}
	return content, verdict, err
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// fetch brings the layers that are not there, side by side.
func (a *Agent) fetch(ctx context.Context, r *Report, repo Repository, store *install.Store, set *install.Set, id bundle.Identity, facts *host.Facts) error {
	var done atomic.Int64
	g, gctx := errgroup.WithContext(ctx)
	for _, l := range set.Layers {
		if store.HasLayer(l.Digest) {
			r.CachedBytes += l.Size
			continue
		}
		r.FetchedBytes += l.Size
		r.did("fetch %s layer %s, %s", l.Kind, short(l.Digest), size(l.Size))
		g.Go(func() error {
			err := store.AddLayer(l.Digest, func(dst *os.Root) error {
				if err := unpack(gctx, repo, l, dst); err != nil {
					return err
				}
				a.parts.Line.Say("fetch", "%s", size(done.Add(l.Size)))
				if l.Kind != bundle.LayerModules {
					return nil
				}
				mods, err := inspect(dst.FS(), id, facts)
				set.Modules = mods
				return err
			})
			if err != nil {
				return fmt.Errorf("fetch %s layer %s: %w", l.Kind, l.Digest, err)
			}
			return nil
		})
	}
	err := g.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx) // not what it did to the streams
	}
	return err
}

func unpack(ctx context.Context, repo Repository, l install.Layer, dst *os.Root) (err error) {
	rc, err := repo.Blob(ctx, l.Digest, l.Size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rc.Close()) }()
	return bundle.Unpack(ctx, rc, l.Digest, l.DiffID, l.Size, dst)
}

// loadOrder is the order in which modules are loaded, and their order in a set.
var loadOrder = []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm", "nvidia-peermem"}

// inspect reads every module of a layer, checks that it is for this kernel and
// this driver, and notes its digest for the moment when it is loaded.
func inspect(layer fs.FS, id bundle.Identity, facts *host.Facts) ([]install.Module, error) {
	files, err := fs.Glob(layer, "drivers/*.ko")
	if err != nil {
		return nil, err
	}
	var mods []install.Module
	for _, file := range files {
		m, err := inspectOne(layer, file)
		if err != nil {
			return nil, err
		}
		mismatch := func(what, got, want string) error {
			return fault.New(fault.Mismatch, fmt.Sprintf("check module %s: %s %q; want %q", m.Name, what, got, want),
				"have the driver built for this very COS build")
		}
		release, _, _ := strings.Cut(m.Vermagic, " ")
		switch {
		case release != facts.Kernel.Release:
			return nil, mismatch("made for kernel", release, facts.Kernel.Release)
		case m.Vermagic != id.Vermagic:
			return nil, mismatch("vermagic", m.Vermagic, id.Vermagic)
		case m.Version != "" && m.Version != id.Driver.Modules().Version:
			return nil, mismatch("version", m.Version, id.Driver.Modules().Version)
		}
		mods = append(mods, m)
	}
	if !slices.ContainsFunc(mods, func(m install.Module) bool { return m.Name == "nvidia" }) {
		return nil, fault.New(fault.Mismatch, "check modules: the modules layer holds no drivers/nvidia.ko", "have the driver built again")
	}
	slices.SortStableFunc(mods, func(a, b install.Module) int { return rank(a.Name) - rank(b.Name) })
	return mods, nil
}

func rank(module string) int {
	if i := slices.Index(loadOrder, module); i >= 0 {
		return i
	}
	return len(loadOrder)
}

func inspectOne(layer fs.FS, file string) (install.Module, error) {
	info, err := fs.Stat(layer, file)
	if err != nil {
		return install.Module{}, fmt.Errorf("check module: %w", err)
	}
	if info.Size() > maxModule {
		return install.Module{}, fault.New(fault.Unverified, fmt.Sprintf("check module %s: %d bytes; at most %d are read", file, info.Size(), maxModule), "")
	}
	raw, err := fs.ReadFile(layer, file)
	if err != nil {
		return install.Module{}, fmt.Errorf("check module: %w", err)
	}
	m, err := modinfo.Read(bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		return install.Module{}, fmt.Errorf("check module %s: %w", file, err)
	}
	return install.Module{
		Name: strings.TrimSuffix(path.Base(file), ".ko"), File: file, SHA256: digestOf(raw), Size: int64(len(raw)),
		Version: m.Version, Vermagic: strings.TrimSpace(m.Vermagic), BuildID: m.BuildID, Signed: m.Signed,
	}, nil
}

// planBring reports what bring would do.
func (a *Agent) planBring(r *Report, store *install.Store, set, current *install.Set) {
	for _, l := range set.Layers {
		if store != nil && store.HasLayer(l.Digest) {
			r.CachedBytes += l.Size
			continue
		}
		r.FetchedBytes += l.Size
		r.did("fetch %s layer %s, %s", l.Kind, short(l.Digest), size(l.Size))
	}
	if current == nil || current.Digest != set.Digest {
		r.Changed = true
		r.did("switch %s to %s", a.cfg.InstallDir, short(set.Digest))
	}
}
