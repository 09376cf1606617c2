package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"reflect"
	"slices"
	"sort"
	"strings"
	"time"

	ocidigest "github.com/opencontainers/go-digest"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/trust"
)

// maxModule is the maximum size of one module in bytes. The largest real module has 65 MB.
const maxModule = 512 << 20

// fetchAndStage verifies the resolved artifact, fetches the missing layers, and stages the driver without activating
// it.
func (a *Agent) fetchAndStage(ctx context.Context, r *Report, store *install.Store, facts *host.Facts,
	current *install.Set) (*install.Set, error) {
	var repo Repository
	var content bundle.Content
	var p evidence
	origin := originOf(r.Answer)
	err := a.parts.Line.Do("verify", func() (_ string, err error) {
		var verdict *trust.Verdict
		if repo, p, content, verdict, err = a.judge(ctx, store, r.Answer, facts); err != nil {
			return "", err
		}
		r.SignedBy, r.Signatures = verdict.SignedBy(), verdict.Signatures
		if !a.cfg.NoLoad { // do not fetch a driver that the kernel will certainly refuse
			if err := facts.Policy.Allows("nvidia", verdict.ModulesSigned); err != nil {
				return "", err
			}
		}
		return fmt.Sprintf("%s signed by %s", short(r.Answer.Digest), r.SignedBy), nil
	})
	if err != nil {
		return nil, err
	}
	set := a.setOf(origin, r.Answer.Digest, repo.Name(), content, facts)
	if origin == install.MadeHere {
		set.Wish = a.wanted.wish
	}
	r.layers = set.Layers
	if a.cfg.DryRun {
		a.planStage(ctx, r, repo, store, set, current)
		return set, nil
	}
	err = a.parts.Line.Do("fetch", func() (string, error) {
		if err := a.fetchFromAny(ctx, r, repo, store, set, content.Identity, facts); err != nil {
			return "", err
		}
		return fmt.Sprintf("%s, cached %s", size(r.FetchedBytes), size(r.CachedBytes)), nil
	})
	if err != nil {
		return nil, err
	}
	err = a.parts.Line.Do("stage", func() (string, error) {
		if set.Modules, err = a.modules(store, content, facts); err != nil {
			return "", err
		}
		if current != nil && current.Digest == set.Digest && current.Kernel == set.Kernel {
			set.InstalledAt = current.InstalledAt
		}
		raw, err := json.Marshal(p)
		if err != nil {
			return "", err
		}
		if have, err := store.Evidence(set.Digest); err == nil && bytes.Equal(have, raw) && reflect.DeepEqual(set, current) &&
			store.LinksHold(*set) == nil {
			return "already staged", nil
		}
		if err := store.AddSet(*set, raw); err != nil {
			return "", err
		}
		return plural(len(set.Modules), "module") + " checked", nil
	})
	if err != nil {
		return nil, err
	}
	return set, nil
}

// refresh fetches the signed list that the verifier reads. If that fails, the verifier decides whether this matters.
func (a *Agent) refresh(ctx context.Context) {
	if a.parts.Refresh == nil {
		return
	}
	if err := a.parts.Refresh(ctx); err != nil {
		a.parts.Log.WarnContext(ctx, "could not refresh the snapshot", "err", err)
	}
}

// since returns the time for rules about new artifacts, such as the maximum age. It returns zero if the node's own
// evidence still verifies, so damaged files can be fetched again.
func (a *Agent) since(store *install.Store, origin install.Origin, answer resolve.Answer, facts *host.Facts) time.Time {
	if store != nil {
		if raw, err := store.Evidence(answer.Digest); err == nil && raw != nil {
			var p evidence
			if json.Unmarshal(raw, &p) == nil {
				if _, _, err := a.verify(p, origin, answer.Digest, answer.Driver, facts, time.Time{}); err == nil {
					return time.Time{}
				}
			}
		}
	}
	return a.parts.Now()
}

// maxBundles is the maximum size of all statements of one artifact, in bytes. Real statements have some hundred
// kilobytes.
const maxBundles = 16 << 20

// readEvidence reads the manifest, the config and the signed statements, but no layer.
func readEvidence(ctx context.Context, repo Repository, v Verifier, digest string, facts *host.Facts) (p evidence,
	err error) {
	if p.Manifest, err = repo.Manifest(ctx, digest); err != nil {
		return p, err
	}
	if got := digestOf(p.Manifest); got != digest { // check the digest before anything that the manifest lists is fetched
		return p, fault.New(fault.Unverified, fmt.Sprintf("read manifest %s: the content has digest %s", digest, got),
			"fetch the artifact from another registry: --registry REF")
	}
	d, err := bundle.ConfigDescriptor(p.Manifest)
	if err != nil {
		return p, err
	}
	if p.Config, err = repo.Small(ctx, d); err != nil {
		return p, err
	}
	p.Bundles, err = repo.AttachedIf(ctx, digest, trust.ArtifactTypeBundle, trust.Useful(v, digest),
		v.Wanted(facts.Kernel)...)
	p.Bundles = bounded(p.Bundles)
	return p, err
}

// bounded returns the first bundles, together at most maxBundles bytes, because the node stores them with the driver.
func bounded(bundles [][]byte) [][]byte {
	size := 0
	for i, b := range bundles {
		if size += len(b); size > maxBundles {
			return bundles[:i]
		}
	}
	return bundles
}

func digestOf(data []byte) string {
	return ocidigest.FromBytes(data).String()
}

// loadOrder is the order in which modules are loaded and listed.
var loadOrder = []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm", "nvidia-peermem"}

// inspect reads the modules of a layer, and checks that they fit this kernel and this driver. known maps names of files
// to their digests. If known is not nil, inspect reads only these files, and computes only the digests that are "" in
// known.
func inspect(layer fs.FS, id bundle.Identity, facts *host.Facts, known map[string]string) ([]install.Module, error) {
	files, err := fs.Glob(layer, "drivers/*.ko")
	if err != nil {
		return nil, err
	}
	var mods []install.Module
	for _, file := range files {
		digest, ok := known[file]
		if !ok && known != nil {
			continue // another program added the file
		}
		m, err := inspectOne(layer, file, digest)
		if err != nil {
			return nil, err
		}
		mods = append(mods, m)
	}
	// Not slices.SortStableFunc, which adds 7 KB to the program.
	sort.SliceStable(mods, func(i, j int) bool { return rank(mods[i].Name) < rank(mods[j].Name) })
	return mods, fit(mods, id, facts)
}

// fit checks that modules are for this kernel and this driver.
func fit(mods []install.Module, id bundle.Identity, facts *host.Facts) error {
	for _, m := range mods {
		mismatch := func(what, got, want string) error {
			return fault.New(fault.Mismatch, fmt.Sprintf("check module %s: the module has %s %q; want %q", m.Name, what, got,
				want),
				"build and publish the driver for the COS build of this node: builder build")
		}
		release, _, _ := strings.Cut(m.Vermagic, " ")
		switch {
		case release != facts.Kernel.Release:
			return mismatch("kernel release", release, facts.Kernel.Release)
		case m.Vermagic != id.Vermagic:
			return mismatch("vermagic", m.Vermagic, id.Vermagic)
		case m.Version != "" && m.Version != id.Driver.Modules().Version:
			return mismatch("version", m.Version, id.Driver.Modules().Version)
		}
	}
	if !slices.ContainsFunc(mods, func(m install.Module) bool { return m.Name == "nvidia" }) {
		return fault.New(fault.Mismatch, "check modules: the modules layer has no file drivers/nvidia.ko",
			"build and publish the driver again: builder build")
	}
	return nil
}

func rank(module string) int {
	if i := slices.Index(loadOrder, module); i >= 0 {
		return i
	}
	return len(loadOrder)
}

// readModule reads a whole module into memory, because init_module needs that.
func readModule(layer fs.FS, file string) (_ []byte, err error) {
	f, size, err := openModule(layer, file)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	raw := make([]byte, size)
	_, err = io.ReadFull(f, raw)
	return raw, err
}

// inspectOne reads one module piece by piece, because modules may be large. If the digest is known, it reads only the
// description.
func inspectOne(layer fs.FS, file, digest string) (_ install.Module, err error) {
	f, size, err := openModule(layer, file)
	if err != nil {
		return install.Module{}, fault.Wrap(fault.Unverified, fmt.Errorf("check module %s: %w", file, err), hintAgain)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if digest == "" {
		h := sha256.New()
		if n, err := io.Copy(h, f); err != nil || n != size {
			return install.Module{}, fault.Wrap(fault.Unverified,
				fmt.Errorf("check module %s: only %d of %d bytes could be read: %w", file, n, size, err), hintAgain)
		}
		digest = ocidigest.NewDigest(ocidigest.SHA256, h).String()
	}
	at, ok := f.(io.ReaderAt)
	if !ok {
		return install.Module{}, fmt.Errorf("check module %s: %w", file, fs.ErrInvalid)
	}
	m, err := modinfo.Read(at, size)
	if err != nil {
		return install.Module{}, fmt.Errorf("check module %s: %w", file, err)
	}
	return install.Module{
		Name: strings.TrimSuffix(path.Base(file), ".ko"), File: file, SHA256: digest, Size: size,
		Version: m.Version, Vermagic: strings.TrimSpace(m.Vermagic), BuildID: m.BuildID, Signed: m.Signed,
	}, nil
}

// openModule opens one module. The file must be regular and not larger than maxModule.
func openModule(layer fs.FS, file string) (fs.File, int64, error) {
	check := func(info fs.FileInfo, err error) error {
		if err == nil && (!info.Mode().IsRegular() || info.Size() > maxModule) {
			err = fault.New(fault.Unverified, fmt.Sprintf("%s is not a regular file of at most %d bytes", file, maxModule), "")
		}
		return err
	}
	if err := check(fs.Stat(layer, file)); err != nil { // before Open, because opening a pipe would block
		return nil, 0, err
	}
	f, err := layer.Open(file)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err := check(info, err); err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

// planStage adds to the report what fetchAndStage would fetch and switch.
func (a *Agent) planStage(ctx context.Context, r *Report, repo Repository, store *install.Store, set,
	current *install.Set) {
	if _, err := a.missing(ctx, r, repo, store, set); err != nil {
		return // the context has ended
	}
	if current == nil || current.Digest != set.Digest {
		r.Changed = true
		r.did("switch %s to %s", a.cfg.InstallDir, short(set.Digest))
	}
}
