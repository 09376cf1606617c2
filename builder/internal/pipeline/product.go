package pipeline

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
)

// staged returns the folder with a driver version's user space or firmware.
func (r *run) staged(ctx context.Context, kind bundle.LayerKind) (string, error) {
	stage := r.release.StageUserspace
	if kind == bundle.LayerFirmware {
		stage = r.release.StageFirmware
	}
	dir, _, err := r.cfg.Cache.Tree(ctx, string(kind), nvsrc.StageRecipe+"-"+r.release.Digest[len("sha256:"):], func(_ context.Context, dir string) error { return stage(dir) })
	return dir, err
}

// packed returns a layer of the staged folder, compressed once and kept.
func (r *run) packed(ctx context.Context, kind bundle.LayerKind, src, key string) (layer bundle.Layer, cached bool, err error) {
	dir, cached, err := r.cfg.Cache.Tree(ctx, "layer-"+string(kind), key, func(ctx context.Context, dir string) error {
		layer, err := bundle.PackLayer(ctx, src, kind, filepath.Join(dir, "layer.tar.zst"))
		if err != nil {
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
		return layer, false, fmt.Errorf("read %s layer: %w", kind, err)
	}
	layer.Path = filepath.Join(dir, "layer.tar.zst")
	return layer, cached, nil
}

func (r *run) pack(ctx context.Context) (string, error) {
	reused := 0
	for _, kind := range bundle.LayerKinds() {
		var src, key string
		var err error
		if kind == bundle.LayerModules {
			key = r.key(compile.Recipe, bundle.PackRecipe, string(r.kernel.Fingerprint))
			var cleanup func() error
			if src, cleanup, err = r.modulesFolder(); err != nil {
				return "", err
			}
			defer func() { _ = cleanup() }() // a scratch folder; the next Open removes it as well
		} else {
			key = bundle.PackRecipe + "-" + nvsrc.StageRecipe + "-" + r.release.Digest[len("sha256:"):]
			if src, err = r.staged(ctx, kind); err != nil {
				return "", err
			}
		}
		layer, cached, err := r.packed(ctx, kind, src, key)
		if err != nil {
			return "", fmt.Errorf("%s layer: %w", kind, err)
		}
		if cached {
			reused++
		}
		fmt.Fprintf(r.log, "%s layer %s, %d bytes\n", kind, layer.Digest, layer.Size)
		r.res.Layers = append(r.res.Layers, layer)
	}
	var size int64
	for _, l := range r.res.Layers {
		size += l.Size
	}
	return fmt.Sprintf("3 layers, %.1f MB, %d cached", float64(size)/1e6, reused), nil
}

// modulesFolder lays the modules out as their layer wants them.
func (r *run) modulesFolder() (string, func() error, error) {
	dir, cleanup, err := r.cfg.Cache.TempDir("modules-")
	if err != nil {
		return "", nil, err
	}
	if err := os.Mkdir(filepath.Join(dir, "drivers"), 0o755); err != nil {
		return "", nil, errors.Join(err, cleanup())
	}
	for name, path := range r.modules {
		if err := copyFile(filepath.Join(dir, "drivers", name+".ko"), path); err != nil {
			return "", nil, errors.Join(err, cleanup())
		}
	}
	return dir, cleanup, nil
}

// publish signs the statements about the image and sends all of it out.
func (r *run) publish(ctx context.Context) (string, error) {
	image, err := bundle.Image(r.id, r.res.Layers)
	if err != nil {
		return "", err
	}
	digest, err := image.Digest()
	if err != nil {
		return "", err
	}
	r.res.Digest, r.res.Tag = digest.String(), bundle.Tag(r.id)
	signer, err := sign.LoadSigner(ctx, r.cfg.Key)
	if err != nil {
		return "", err
	}
	statements, err := r.statements()
	if err != nil {
		return "", err
	}
	var bundles [][]byte
	for _, statement := range statements {
		b, err := sign.Bundle(ctx, signer, statement)
		if err != nil {
			return "", err
		}
		bundles = append(bundles, b)
	}
	verifier, err := signer.Verifier()
	if err != nil {
		return "", err
	}
	r.res.Existed = true
	for _, dest := range r.cfg.Destinations {
		repo, err := registry.Open(dest, r.cfg.Registry(dest))
		if err != nil {
			return "", err
		}
		got, existed, err := publish.Publish(ctx, repo, publish.Artifact{Image: image, Identity: r.id, Kernel: r.kernel.Kernel, Bundles: bundles, Verifier: verifier})
		if err != nil {
			return "", fmt.Errorf("publish to %s: %w", dest, err)
		}
		if got != r.res.Digest {
			return "", fault.Errorf(fault.PublishRefused, "publish to %s: it names %s, built %s", dest, got, r.res.Digest)
		}
		r.res.Existed = r.res.Existed && existed
		r.res.Repositories = append(r.res.Repositories, repo.Name())
	}
	note := fmt.Sprintf("%s to %d place(s)", r.res.Digest[:19], len(r.cfg.Destinations))
	if r.res.Existed {
		note += ", was there already"
	}
	return note, nil
}

// statements says how the image was made and for which COS build it is good.
func (r *run) statements() ([]sign.Statement, error) {
	var materials []sign.Material
	for _, m := range append(append([]cossrc.Material(nil), r.kernel.Materials...), r.release.Materials...) {
		materials = append(materials, sign.Material{Name: m.Name, URI: m.URI, Digest: m.Digest})
	}
	facts := map[string]string{
		"compile": compile.Recipe, "stage": nvsrc.StageRecipe, "pack": bundle.PackRecipe,
		"builder": r.cfg.Version, "vermagic": r.id.Vermagic,
		"loadTest": "static checks only",
	}
	if r.res.LoadTest != nil {
		facts["loadTest"] = r.res.LoadTest.State
	}
	provenance, err := sign.Provenance(r.res.Digest, sign.BuildFacts{
		Kernel: r.kernel.Kernel, Fingerprint: r.kernel.Fingerprint, Driver: r.res.Driver, Materials: materials,
		BuilderID: r.cfg.BuilderID, Started: r.started, Finished: time.Now().UTC(), Facts: facts,
	})
	if err != nil {
		return nil, err
	}
	match, err := sign.KernelMatch(r.res.Digest, r.kernel.Kernel, r.kernel.Fingerprint, r.res.Driver)
	if err != nil {
		return nil, err
	}
	return []sign.Statement{provenance, match}, nil
}
