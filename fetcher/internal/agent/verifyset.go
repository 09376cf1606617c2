package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// evidence has everything that is needed to verify an artifact. It is not trusted before [Agent.verify], whether it
// comes from a registry or from the disk.
type evidence struct {
	Manifest []byte   `json:"manifest"`
	Config   []byte   `json:"config"`
	Bundles  [][]byte `json:"bundles"`
}

// verify checks the evidence of an artifact for this node. Each error has a hint. Pass a zero time for an artifact that
// is on the node already, because its age must not invalidate it.
func (a *Agent) verify(p evidence, origin install.Origin, digest string, d target.Driver, facts *host.Facts,
	now time.Time) (bundle.Content, *trust.Verdict, error) {
	none := bundle.Content{}
	v, err := a.verifierFor(origin)
	if err != nil {
		return none, nil, err
	}
	if got := digestOf(p.Manifest); got != digest {
		return none, nil, fault.New(fault.Unverified, fmt.Sprintf("read manifest %s: the content has digest %s", digest, got),
			"fetch the artifact from another registry: --registry REF")
	}
	content, err := bundle.ParseManifest(p.Manifest, p.Config) // also compares the config with its digest
	if err != nil {
		return none, nil, err
	}
	verdict, err := v.Verify(p.Bundles,
		trust.Expect{Digest: digest, Kernel: facts.Kernel, Driver: d, Identity: content.Identity, Now: now})
	switch {
	case fault.Hint(err) != "":
	case fault.Is(err, fault.Mismatch):
		err = fault.Wrap(fault.Mismatch, err,
			"build and publish the driver for COS "+facts.Kernel.String()+", or check --server and --registry")
	case fault.Is(err, fault.Unverified):
		err = fault.Wrap(fault.Unverified, err,
			"publish the artifact again with \"builder build\", or fetch it from another registry: --registry REF")
	}
	return content, verdict, err
}

// verifierFor returns the verifier for an artifact. The node's own key counts only for artifacts that the node
// compiled.
func (a *Agent) verifierFor(origin install.Origin) (Verifier, error) {
	if origin == install.MadeHere && a.parts.NodeVerifier != nil {
		return a.parts.NodeVerifier()
	}
	if a.parts.Verifier == nil {
		return nil, fault.New(fault.Usage, "no signer is trusted",
			"without a key, no driver is loaded; give the publisher's public key: --public-key FILE")
	}
	return a.parts.Verifier, nil
}

// setOf describes an artifact as a driver on the disk, by its signed content. Modules stays empty, because the signed
// content has no digests of modules.
func (a *Agent) setOf(origin install.Origin, digest, repository string, content bundle.Content,
	facts *host.Facts) *install.Set {
	set := &install.Set{
		Digest: digest, Origin: origin, Repository: repository, Kernel: facts.Kernel, Driver: content.Identity.Driver,
		InstalledAt: a.parts.Now().UTC(),
	}
	for _, l := range content.Layers {
		set.Layers = append(set.Layers, install.Layer{Kind: l.Kind, Digest: l.Digest, DiffID: l.DiffID, Size: l.Size})
	}
	return set
}

// verifySet verifies the statements of a driver on the disk, and compares its layers with the signed content: all
// layers, or only the given kinds. It returns a description from the signed content. From set.json it takes only where
// the files are, the time and the wish.
func (a *Agent) verifySet(ctx context.Context, store *install.Store, set *install.Set, facts *host.Facts,
	kinds ...bundle.LayerKind) (*install.Set, error) {
	fail := func(err error) (*install.Set, error) {
		if ctx.Err() == nil && !fault.Is(err, fault.Transient) {
			a.unverified.Store(set.Digest, err)
		}
		return nil, fmt.Errorf("verify installed driver %s: %w", set.Driver, err)
	}
	content, err := a.attestations(store, set, facts)
	if err != nil {
		return fail(err)
	}
	proved := a.setOf(set.Origin, set.Digest, set.Repository, content, facts)
	proved.InstalledAt, proved.Wish = set.InstalledAt, set.Wish
	g, gctx := errgroup.WithContext(ctx)
	for _, l := range proved.Layers {
		if len(kinds) == 0 || slices.Contains(kinds, l.Kind) {
			g.Go(func() error { return a.checkLayer(gctx, store, l) })
		}
	}
	if err := g.Wait(); err != nil {
		return fail(err)
	}
	if err := store.LinksHold(*proved); err != nil {
		return fail(err)
	}
	if proved.Modules, err = a.modules(store, content, facts); err != nil {
		return fail(err)
	}
	return proved, nil
}

// attestations verifies the attestations of a driver on the disk, but none of its files.
func (a *Agent) attestations(store *install.Store, set *install.Set, facts *host.Facts) (bundle.Content, error) {
	raw, err := store.Evidence(set.Digest)
	if err != nil {
		return bundle.Content{}, err
	}
	var p evidence
	if raw == nil {
		return bundle.Content{}, fault.New(fault.Unverified, "the driver's attestations are not on this node",
			"to store the attestations, run this while the registry can be reached: fetcher install")
	}
	if err := json.Unmarshal(raw, &p); err != nil {
		return bundle.Content{}, fault.Wrap(fault.Unverified,
			fmt.Errorf("read the driver's attestations on this node: %w", err), hintAgain)
	}
	content, _, err := a.verify(p, set.Origin, set.Digest, set.Driver, facts, time.Time{})
	return content, err
}

// verifiable reports whether the attestations of a driver on the disk verify, and its files did not fail in this run.
func (a *Agent) verifiable(store *install.Store, set *install.Set, facts *host.Facts) bool {
	if set == nil || set.Damaged {
		return false
	}
	if _, bad := a.unverified.Load(set.Digest); bad {
		return false
	}
	_, err := a.attestations(store, set, facts)
	return err == nil
}

const hintAgain = "replace the damaged files: fetcher install"

// checkedLayer is a layer that was compared with its signed diff id.
type checkedLayer struct {
	// files has the digest of each file of the layer, by the file's name.
	files map[string]string
	// print is the digest over the layer's inodes ([install.Store.LayerPrint]), read before the check.
	print string
	// modules describes the layer's modules. nil means that they were not read.
	modules []install.Module
}

// unchanged reports whether a layer's inodes are the same as at its last check. Before an activation or load, this is
// not enough: call [Agent.verifySet].
func (a *Agent) unchanged(store *install.Store, l install.Layer) bool {
	known, ok := a.layer(l.Digest)
	if !ok || known.print == "" {
		return false
	}
	print, err := store.LayerPrint(l.Digest)
	return err == nil && print == known.print
}

// layer returns the result of a layer's check in this run, or else in an earlier run.
func (a *Agent) layer(digest string) (checkedLayer, bool) {
	found, ok := a.checked.Load(digest)
	if !ok {
		found, ok = a.seen.Load(digest)
	}
	known, _ := found.(checkedLayer)
	return known, ok
}

// checkLayer compares an unpacked layer with its signed diff id, once in each run and after each change.
func (a *Agent) checkLayer(ctx context.Context, store *install.Store, l install.Layer) error {
	print, err := store.LayerPrint(l.Digest) // before the check, so that a write during the check is noticed
	if err != nil {
		return fault.Wrap(fault.Unverified, err, hintAgain)
	}
	// A run may take hours, so a changed layer is read again.
	if known, ok := a.checked.Load(l.Digest); ok && known.(checkedLayer).print == print {
		return nil
	}
	root, err := store.LayerRoot(l.Digest)
	if err != nil {
		return fault.Wrap(fault.Unverified, err, hintAgain)
	}
	names, err := store.LayerNames(l.Digest)
	if err != nil {
		return errors.Join(err, root.Close())
	}
	files, err := bundle.CheckTree(ctx, root, l.Kind, l.DiffID, names)
	if err := errors.Join(err, root.Close()); err != nil {
		if fault.Is(err, fault.Unverified) {
			err = fault.Wrap(fault.Unverified, err, hintAgain)
		}
		return err
	}
	a.checked.Store(l.Digest, checkedLayer{files: files, print: print})
	return nil
}

// modules describes the modules of a checked modules layer. It computes no digests if the inodes are unchanged: the
// load compares the bytes with the digests.
func (a *Agent) modules(store *install.Store, content bundle.Content, facts *host.Facts) ([]install.Module, error) {
	l := content.Layer(bundle.LayerModules)
	layer, err := store.LayerFS(l.Digest)
	if err != nil {
		return nil, err
	}
	checked, _ := a.layer(l.Digest)
	print, err := store.LayerPrint(l.Digest)
	same := err == nil && checked.print == print && checked.files != nil
	if same && checked.modules != nil {
		return slices.Clone(checked.modules), fit(checked.modules, content.Identity, facts)
	}
	known := map[string]string{}
	for file, digest := range checked.files {
		if known[file] = ""; same { // otherwise inspect computes the digest again
			known[file] = digest
		}
	}
	mods, err := inspect(layer, content.Identity, facts, known)
	if err != nil {
		return nil, err
	}
	for _, m := range mods {
		if checked.files[m.File] != m.SHA256 {
			return nil, fault.New(fault.Unverified, fmt.Sprintf("read module %s: the file changed after its check", m.Name),
				hintAgain)
		}
	}
	return mods, nil
}

// originOf returns the origin of an answer.
func originOf(answer resolve.Answer) install.Origin {
	if answer.Source == resolve.SourceNode {
		return install.MadeHere
	}
	return install.Published
}
