package pipeline

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
)

// stagedFolder returns the folder with a driver's user space or firmware.
func (r *run) stagedFolder(ctx context.Context, in *inputs, kind bundle.LayerKind) (string, error) {
	stage := in.release.StageUserspace
	if kind == bundle.LayerFirmware {
		stage = in.release.StageFirmware
	}
	dir, _, err := r.products.Tree(ctx, string(kind), nvsrc.StageRecipe+"-"+in.release.Digest[len("sha256:"):],
		func(ctx context.Context, dir string) error {
			err := stage(dir)
			// Check the release before the error: if it changed during the copy, the copy must not get into the cache.
			if damaged := r.cfg.Cache.Recheck(ctx, in.release.Dir); damaged != nil {
				return damaged
			}
			return err
		})
	return dir, err
}

// packLayer packs the content of a folder into a layer. The compressed layer is stored in the cache under key. The
// recipe must be a part of the key.
func (r *run) packLayer(ctx context.Context, recipe string, kind bundle.LayerKind, src, key string) (layer bundle.Layer,
	cached bool, err error) {
	dir, cached, err := r.products.Tree(ctx, "layer-"+string(kind), key, func(ctx context.Context, dir string) error {
		layer, err := bundle.PackLayerAs(ctx, recipe, src, kind, filepath.Join(dir, "layer.tar.zst"))
		if err != nil {
			return err
		}
		if err := r.products.Recheck(ctx, src); err != nil {
			return err
		}
		raw, err := json.Marshal(layer)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, "layer.json"), raw, 0o644)
	})
	if err != nil {
		return layer, false, err
	}
	raw, err := os.ReadFile(filepath.Join(dir, "layer.json"))
	if err != nil {
		return layer, false, err
	}
	if err := json.Unmarshal(raw, &layer); err != nil {
		return layer, false, fmt.Errorf("read the description of the %s layer in the cache: %w", kind, err)
	}
	layer.Path = filepath.Join(dir, "layer.tar.zst")
	return layer, cached, nil
}

// layer is a packed layer, or the error of packing it.
type layer struct {
	bundle.Layer
	cached bool // true if an earlier build packed the layer
	err    error
}

// driverLayer packs user space or firmware, which depend on the release only.
func (r *run) driverLayer(ctx context.Context, in *inputs, recipe string, kind bundle.LayerKind) (l layer) {
	src, err := r.stagedFolder(ctx, in, kind)
	if err != nil {
		return layer{err: err}
	}
	key := recipe + "-" + nvsrc.StageRecipe + "-" + in.release.Digest[len("sha256:"):]
	l.Layer, l.cached, l.err = r.packLayer(ctx, recipe, kind, src, key)
	return l
}

// moduleLayer packs the modules.
func (r *run) moduleLayer(ctx context.Context, in *inputs, recipe string, m *modules) (l layer) {
	src, cleanup, err := r.modulesFolder(m)
	if err != nil {
		return layer{err: err}
	}
	defer func() { _ = cleanup() }() // a failure is ignored: the next Open of the cache removes the folder
	l.Layer, l.cached, l.err = r.packLayer(ctx, recipe, bundle.LayerModules, src, m.key(in, recipe))
	return l
}

// earlyLayers are the layers of user space and firmware, packed while the modules compile.
type earlyLayers struct {
	group  sync.WaitGroup
	stop   context.CancelFunc
	layers map[bundle.LayerKind]layer
}

func (r *run) packEarly(ctx context.Context, in *inputs) *earlyLayers {
	a := &earlyLayers{layers: map[bundle.LayerKind]layer{}}
	ctx, a.stop = context.WithCancel(ctx)
	recipe := r.recipe
	a.group.Go(func() {
		for _, kind := range bundle.LayerKinds() {
			if kind != bundle.LayerModules {
				a.layers[kind] = r.driverLayer(ctx, in, recipe, kind)
			}
		}
	})
	return a
}

// take waits for packEarly and returns the layer of this kind. If packEarly did not pack the layer, take returns false,
// and the caller packs it.
func (a *earlyLayers) take(kind bundle.LayerKind) (layer, bool) {
	if a == nil {
		return layer{}, false
	}
	a.group.Wait()
	l, ok := a.layers[kind]
	return l, ok && l.err == nil
}

// end cancels the early packing and waits until it has stopped.
func (a *earlyLayers) end() {
	if a != nil {
		a.stop()
		a.group.Wait()
	}
}

// pack returns the three layers of the artifact. If r.wanted is set, pack tries all recipes until the artifact has this
// digest. If no recipe gives this digest, pack uses the newest recipe.
func (r *run) pack(ctx context.Context, in *inputs, m *modules, early *earlyLayers) (layers []bundle.Layer, note string,
	err error) {
	recipes := []string{r.recipe}
	if r.wanted != "" {
		recipes = append(bundle.PackRecipes(), bundle.PackRecipe)
	}
	for _, r.recipe = range recipes {
		if layers, note, err = r.packAll(ctx, in, r.recipe, m, early); err != nil {
			return nil, "", err
		}
		early = nil // the early layers were packed by the first recipe
		img, err := bundle.Image(m.identity, layers)
		if err != nil {
			return nil, "", err
		}
		digest, err := img.Digest()
		if err != nil {
			return nil, "", err
		}
		if digest.String() == r.wanted {
			break
		}
	}
	if r.recipe != bundle.PackRecipe {
		note += ", packed as published: " + r.recipe
	}
	r.res.Layers = layers
	return layers, note, nil
}

// packAll packs the modules, and the layers that were not packed early.
func (r *run) packAll(ctx context.Context, in *inputs, recipe string, m *modules,
	early *earlyLayers) (layers []bundle.Layer, note string, err error) {
	reused := 0
	for _, kind := range bundle.LayerKinds() {
		var l layer
		if kind == bundle.LayerModules {
			l = r.moduleLayer(ctx, in, recipe, m)
		} else if known, ok := early.take(kind); ok {
			l = known
		} else {
			l = r.driverLayer(ctx, in, recipe, kind)
		}
		if l.err != nil {
			return nil, "", fmt.Errorf("make the %s layer: %w", kind, l.err)
		}
		if l.cached {
			reused++
		}
		fmt.Fprintf(r.log, "%s layer %s, %d bytes, recipe %s\n", kind, l.Digest, l.Size, recipe)
		layers = append(layers, l.Layer)
	}
	var size int64
	for _, l := range layers {
		size += l.Size
	}
	note = fmt.Sprintf("3 layers, %.1f MB", float64(size)/1e6)
	if reused > 0 {
		note += fmt.Sprintf(", %d cached", reused)
	}
	return layers, note, nil
}

// modulesFolder copies the modules into a new folder, with their paths in the layer.
func (r *run) modulesFolder(m *modules) (string, func() error, error) {
	dir, cleanup, err := r.products.TempDir("modules-")
	if err != nil {
		return "", nil, err
	}
	if err := r.copyModules(m, dir); err != nil {
		return "", nil, errors.Join(err, cleanup())
	}
	return dir, cleanup, nil
}

// copyModules copies the modules into dir/drivers, and compares them with their checksums.
func (r *run) copyModules(m *modules, dir string) error {
	if err := os.Mkdir(filepath.Join(dir, "drivers"), 0o755); err != nil {
		return fault.CacheDisk(err)
	}
	for name, path := range m.files {
		sum, err := hostfile.CopySum(filepath.Join(dir, "drivers", name+".ko"), path)
		if err != nil {
			return fault.CacheDisk(err)
		}
		if sum != m.sums[name] {
			return changedError(name, r.products.Dir())
		}
	}
	return nil
}
