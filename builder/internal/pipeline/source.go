package pipeline

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/modcheck"
	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/target"
)

// inputs has everything from which a cell is built.
type inputs struct {
	kernel   *cossrc.Inputs
	release  *nvsrc.Release
	driver   target.Driver
	host     string            // digest of the programs of this machine that a build runs
	pahole   string            // version of pahole; "" if the modules get no BTF
	google   *googleSignatures // nil if the bucket has no signatures or the build uses none
	prebuilt *googleModules    // nil without GoogleModules
	labels   map[string]string // COS's labels, if this run sets labels
}

// source fetches and checks every input, and chooses the driver version.
func (r *run) source(ctx context.Context) (_ *inputs, note string, err error) {
	kernels, err := cosbucket.Open(ctx, r.cfg.KernelMirror)
	if err != nil {
		return nil, "", err
	}
	defer kernels.Close()
	drivers, err := cosbucket.Open(ctx, r.cfg.DriverMirror)
	if err != nil {
		return nil, "", err
	}
	defer drivers.Close()
	in := &inputs{}
	if in.kernel, err = cossrc.Fetch(ctx, kernels, r.cfg.Cache, r.req.BuildID, r.req.Board, r.progress("source"),
		r.cfg.KernelOptions()...); err != nil {
		return nil, "", err
	}
	if in.pahole, err = r.findPahole(ctx, in.kernel); err != nil {
		return nil, "", err
	}
	r.res.Kernel, r.res.Fingerprint = in.kernel.Kernel, in.kernel.Fingerprint
	if in.host, err = sandbox.HostTools(); err != nil {
		return nil, "", err
	}
	version, ok := r.req.Driver.Exact()
	if !ok {
		list, err := kernels.Drivers(ctx, in.kernel.Kernel)
		if err != nil {
			return nil, "", err
		}
		if version, err = list.Choose(r.req.Driver); err != nil {
			return nil, "", err
		}
	}
	in.driver = target.Driver{Version: version, Flavour: r.req.Flavour}
	r.res.Driver = in.driver
	if in.labels, err = r.readLabels(ctx, kernels, in); err != nil {
		return nil, "", err
	}
	if in.release, err = nvsrc.Fetch(ctx, drivers, r.cfg.Cache, version, in.kernel.Kernel.Arch,
		r.progress("source")); err != nil {
		return nil, "", err
	}
	if _, err := in.release.Source(r.req.Flavour); err != nil {
		return nil, "", err
	}
	if in.google, err = r.fetchSignatures(ctx, kernels, in); err != nil {
		return nil, "", err
	}
	if in.prebuilt, err = r.fetchModules(ctx, kernels, in); err != nil {
		return nil, "", err
	}
	return in, fmt.Sprintf("kernel %s, ABI %s", in.kernel.Kernel.Release, in.kernel.Fingerprint.Short()), nil
}

// key returns the cache key of a product of this cell. Besides the given parts, it covers the host's programs, the
// driver's sources, the flavour and the version of pahole.
func (in *inputs) key(parts ...string) string {
	if in.pahole != "" {
		parts = append(parts, FactBTF, in.pahole)
	}
	h := sha256.New()
	for _, p := range append(parts, in.host, in.release.SourceDigest, string(in.driver.Flavour)) {
		fmt.Fprintf(h, "%d:%s\n", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// stampedKey returns the cache key of a product made from the compiled and stamped modules and the given texts.
func (in *inputs) stampedKey(more ...string) string {
	return in.key(append(slices.Clone(more), compile.Recipe, modcheck.Recipe, string(in.kernel.Fingerprint))...)
}

// materials returns all inputs of a build for the provenance. Which archives of Google are among the inputs depends on
// who signed the modules.
func (in *inputs) materials(c moduleSigner) []sign.Material {
	var all []sign.Material
	files := slices.Concat(in.kernel.Materials, in.release.Materials)
	switch {
	case c.modules != "":
		files = append(files, in.prebuilt.Materials...)
	case c.google != "":
		files = append(files, in.google.materials...)
	}
	for _, m := range files {
		all = append(all, sign.Material{Name: m.Name, URI: m.URI, Digest: m.Digest})
	}
	return all
}
