package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sort"
	"sync/atomic"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/fetcher/internal/footprint"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// atOnce is the number of layers that are fetched at the same time. Each needs a decompression window of 4 MiB, or 8
// MiB if an older builder packed it.
const atOnce = 2

// missingLayer is a layer that this node must fetch.
type missingLayer struct {
	install.Layer
	// deltas make this layer from a layer on the disk. The smallest is the first.
	deltas []delta
}

func (l missingLayer) bytes() int64 {
	if len(l.deltas) > 0 {
		return l.deltas[0].Size
	}
	return l.Size
}

// delta is one published delta, and the layer on the disk to which it applies.
type delta struct {
	v1.Descriptor
	from install.Layer
}

// fetch fetches the layers that are missing or damaged, at most [atOnce] at the same time.
func (a *Agent) fetch(
	ctx context.Context,
	r *Report,
	repo Repository,
	store *install.Store,
	set *install.Set,
	id bundle.Identity,
	facts *host.Facts,
) error {
	missing, err := a.missing(ctx, r, repo, store, set)
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		if err := a.checkSpace(ctx, store, set.Driver, missing, facts); err != nil {
			return err
		}
		footprint.Trim() // free memory for the decompression windows
	}
	var done atomic.Int64
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	// Start the largest layer first, so that it does not finish alone at the end.
	// Not slices.SortStableFunc, which adds 6 KB to the program.
	sort.SliceStable(missing, func(i, j int) bool { return missing[i].Size > missing[j].Size })
	for _, l := range missing {
		if len(l.deltas) == 0 {
			g.Go(func() error { return a.fetchWhole(gctx, repo, store, l, id, facts, &done) })
		}
	}
	// Apply deltas last: a delta that fills the disk must not harm the whole layers.
	err = g.Wait()
	for _, l := range missing {
		if err == nil && len(l.deltas) > 0 {
			err = a.fetchDelta(ctx, r, repo, store, l, id, facts, &done)
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx) // the cause, not the error that the cancellation caused in the streams
	}
	return err
}

// unpackedPercent is the assumed size of unpacked layers, in percent of their packed size. Layers of drivers unpack to
// 2.24 times their size, and the rest is a margin. reserve is the number of bytes that must stay free on the disk.
const (
	unpackedPercent = 250
	reserve         = 64 << 20
)

// checkSpace returns an error of kind DiskFull if the layers may not fit on the disk. Without this check, each try
// would fill a disk that other programs of the node use, too. If no active driver fits this COS build, or none could be
// loaded, checkSpace only logs: the size is an estimate, and the node needs a driver.
func (a *Agent) checkSpace(ctx context.Context, store *install.Store, d target.Driver, missing []missingLayer,
	facts *host.Facts) error {
	free, err := a.parts.free(store)
	if err != nil {
		a.parts.Log.WarnContext(ctx, "could not find out how much space is free", "err", err)
		return nil
	}
	need := int64(reserve)
	for _, l := range missing {
		need += l.Size * unpackedPercent / 100
	}
	if free >= need {
		return nil
	}
	// The error leaves out how much is free, because this number changes: a node would write another Event at each try.
	err = fault.New(fault.DiskFull,
		fmt.Sprintf("fetch driver %s: the driver may need %s on the disk of %s, and less is free", d, size(need),
			a.cfg.InstallDir),
		"free space on that disk, or set --install-dir to a folder on another disk")
	current, cerr := store.Current()
	unusable := !a.cfg.NoLoad && len(facts.Modules) == 0 // the run began with the load of an installed driver
	try := cerr == nil && (current == nil || fitsNode(current, facts) != nil || unusable)
	a.parts.Log.WarnContext(ctx, "the disk may be too full", "free", size(free), "need", size(need), "tried", try)
	if try {
		return nil
	}
	return err
}

func (a *Agent) fetchWhole(
	ctx context.Context,
	repo Repository,
	store *install.Store,
	l missingLayer,
	id bundle.Identity,
	facts *host.Facts,
	done *atomic.Int64,
) error {
	err := a.addLayer(store, l, id, facts, func(dst *os.Root) error {
		defer func() { a.parts.Line.Progress("fetch", "%s", size(done.Add(l.Size))) }()
		return unpack(ctx, repo, l.Layer, dst)
	})
	if err != nil {
		return fmt.Errorf("fetch %s layer %s: %w", l.Kind, l.Digest, err)
	}
	return nil
}

// fetchDelta makes a layer from the first delta that works. If none works, it fetches the whole layer.
func (a *Agent) fetchDelta(
	ctx context.Context,
	r *Report,
	repo Repository,
	store *install.Store,
	l missingLayer,
	id bundle.Identity,
	facts *host.Facts,
	done *atomic.Int64,
) error {
	for i, d := range l.deltas {
		if i > 0 {
			r.FetchedBytes += d.Size // the first delta is already counted
		}
		err := a.addLayer(
			store,
			l,
			id,
			facts,
			func(dst *os.Root) error { return unpackDelta(ctx, repo, store, l, d, dst) },
		)
		if err == nil || ctx.Err() != nil || fault.NoSpace(err) { // another delta would fill the disk again
			a.parts.Line.Progress("fetch", "%s", size(done.Add(d.Size)))
			return err
		}
		a.parts.Log.WarnContext(ctx, "delta not usable", "digest", d.Digest.String(), "err", err)
	}
	r.FetchedBytes += l.Size
	r.did("fetch the whole layer, %s: no delta could be used", size(l.Size))
	return a.fetchWhole(ctx, repo, store, l, id, facts, done)
}

// addLayer unpacks a layer into the store and checks its modules. For later checks, it stores the modules, and a digest
// over the layer's inodes ([install.Store.LayerPrint]).
func (a *Agent) addLayer(
	store *install.Store,
	l missingLayer,
	id bundle.Identity,
	facts *host.Facts,
	unpack func(*os.Root) error,
) error {
	layer := checkedLayer{files: map[string]string{}}
	err := store.AddLayer(l.Layer, func(dst *os.Root) (err error) {
		if err := unpack(dst); err != nil || l.Kind != bundle.LayerModules {
			return err
		}
		layer.modules, err = inspect(dst.FS(), id, facts, nil)
		for _, m := range layer.modules {
			layer.files[m.File] = m.SHA256
		}
		return err
	})
	if err != nil {
		return err
	}
	layer.print, err = store.LayerPrint(l.Digest)
	a.checked.Store(l.Digest, layer)
	return err
}

// missing returns the layers that must be fetched, and adds their bytes to the report. A damaged layer counts as
// missing.
func (a *Agent) missing(
	ctx context.Context,
	r *Report,
	repo Repository,
	store *install.Store,
	set *install.Set,
) ([]missingLayer, error) {
	damaged := make([]error, len(set.Layers))
	g, gctx := errgroup.WithContext(ctx)
	for i, l := range set.Layers {
		if store == nil || !store.HasLayer(l.Digest) {
			damaged[i] = fs.ErrNotExist
			continue
		}
		g.Go(func() error {
			if !a.unchanged(store, l) {
				damaged[i] = a.checkLayer(gctx, store, l)
			}
			return nil
		})
	}
	_ = g.Wait() // the loop below handles each error
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	var missing []missingLayer
	for i, l := range set.Layers {
		if damaged[i] == nil {
			r.CachedBytes += l.Size
			continue
		}
		if !errors.Is(damaged[i], fs.ErrNotExist) {
			a.parts.Log.WarnContext(ctx, "a layer on this node is damaged", "err", damaged[i])
			r.did("found the %s layer %s damaged", l.Kind, short(l.Digest))
		}
		m := missingLayer{l, a.deltasFor(ctx, repo, store, set, l)}
		r.FetchedBytes += m.bytes()
		if len(m.deltas) > 0 {
			r.did(
				"fetch %s layer %s, %s as a delta of %s",
				l.Kind,
				short(l.Digest),
				size(m.bytes()),
				short(m.deltas[0].from.Digest),
			)
		} else {
			r.did("fetch %s layer %s, %s", l.Kind, short(l.Digest), size(l.Size))
		}
		missing = append(missing, m)
	}
	return missing, nil
}

// maxDeltas is the maximum number of tried deltas for a layer. Anybody may attach a useless delta.
const maxDeltas = 3

// deltasFor finds deltas for a layer of modules, the smallest first. Their source may be untrusted: the resulting layer
// must match the signed content.
func (a *Agent) deltasFor(
	ctx context.Context,
	repo Repository,
	store *install.Store,
	set *install.Set,
	l install.Layer,
) (all []delta) {
	if store == nil || l.Kind != bundle.LayerModules {
		return nil
	}
	sets, err := store.Sets()
	if err != nil {
		return nil
	}
	var wanted []map[string]string
	here := map[string]install.Layer{}
	for _, s := range sets {
		for _, have := range s.Layers {
			_, known := here[have.DiffID]
			if !known && have.Kind == l.Kind && have.Digest != l.Digest && s.Driver == set.Driver &&
				store.HasLayer(have.Digest) {
				here[have.DiffID] = have
				wanted = append(wanted, map[string]string{bundle.AnnotationDeltaFrom: have.DiffID})
			}
		}
	}
	if len(wanted) == 0 {
		return nil
	}
	found, err := repo.Payloads(ctx, set.Digest, bundle.ArtifactTypeDelta, l.Size/2, wanted...)
	if err != nil {
		a.parts.Log.DebugContext(ctx, "could not list deltas", "err", err)
		return nil
	}
	for _, d := range found {
		if from, ok := here[d.Annotations[bundle.AnnotationDeltaFrom]]; ok && len(all) < maxDeltas {
			all = append(all, delta{d, from})
		}
	}
	return all
}

func unpackDelta(
	ctx context.Context,
	repo Repository,
	store *install.Store,
	l missingLayer,
	d delta,
	dst *os.Root,
) (err error) {
	names, err := store.LayerNames(d.from.Digest)
	if err != nil {
		return err
	}
	former, err := store.LayerRoot(d.from.Digest)
	if err != nil {
		return err
	}
	defer former.Close()
	from := bundle.TreeArchive(ctx, former, l.Kind, names)
	defer from.Close()
	digest := d.Digest.String()
	rc, err := repo.Blob(ctx, digest, d.Size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rc.Close()) }()
	return bundle.UnpackDelta(ctx, rc, digest, d.Size, from, l.DiffID, dst)
}

func unpack(ctx context.Context, repo Repository, l install.Layer, dst *os.Root) (err error) {
	rc, err := repo.Blob(ctx, l.Digest, l.Size)
	if err != nil {
		return err
	}
	defer footprint.Trim() // free the decompression window before the next layer
	defer func() { err = errors.Join(err, rc.Close()) }()
	return bundle.Unpack(ctx, rc, l.Digest, l.DiffID, l.Size, dst)
}
