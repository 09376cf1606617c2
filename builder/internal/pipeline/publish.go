package pipeline

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/prebake/prebake/builder/internal/gpus"
	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/sbom"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/twin"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/trust"
)

// factHost is the word under which the provenance names the programs of the host
// that the build ran.
const factHost = "host-tools"

// place is one destination.
type place struct {
	name string
	repo *registry.Repository
}

// lookUp asks every destination whether it has this cell, and, where one has not,
// whether it may be written. A key or a destination that does not work shall show
// before minutes of work, not behind them.
func (r *run) lookUp(ctx context.Context) (string, error) {
	note, err := r.look(ctx)
	if err != nil || r.res.Reused {
		return note, err
	}
	for _, p := range r.places {
		if err := p.repo.CheckPush(ctx); err != nil {
			return "", fmt.Errorf("publish to %s: %w", p.name, err)
		}
	}
	return note, nil
}

func (r *run) look(ctx context.Context) (string, error) {
	var err error
	if r.signer, err = sign.LoadSigner(ctx, r.cfg.Key, r.cfg.KeyOptions...); err != nil {
		return "", err
	}
	if r.verifier, err = r.signer.Verifier(); err != nil {
		return "", err
	}
	if err := r.loadModuleKey(ctx); err != nil {
		return "", err
	}
	switch r.gpus, err = gpus.Read(r.release.Dir, r.release.Version); {
	case fault.Is(err, fault.Unverified): // it is advice: without it nodes go by their GPU's generation
		r.gpus = nil
		r.say("look up")(fmt.Sprintf("the artifact gets no list of supported GPUs: %v", err))
	case err != nil:
		return "", err
	case r.gpus != nil && len(r.gpus.LeftOut) > 0:
		r.say("look up")("left out of supported-gpus.json: " + strings.Join(r.gpus.LeftOut, "; "))
	}
	for _, dest := range r.cfg.Destinations {
		if twin.Is(dest) {
			if err := r.openBucket(ctx, dest); err != nil {
				return "", err
			}
			continue
		}
		repo, err := registry.Open(dest, r.cfg.Registry(dest))
		if err != nil {
			return "", err
		}
		r.places = append(r.places, place{dest, repo})
	}
	r.res.Tag = bundle.Tag(bundle.Identity{Fingerprint: r.kernel.Fingerprint, Driver: r.res.Driver})
	digest := ""
	for _, p := range r.places {
		have, ok, err := publish.Existing(ctx, p.repo, r.res.Tag)
		if err != nil {
			return "", err
		}
		if !ok || digest != "" && have != digest {
			return "not published yet", nil
		}
		digest = have
	}
	if digest == "" {
		return "nowhere to look", nil
	}
	switch reason, err := r.reuse(ctx, digest); {
	case fault.Is(err, fault.Unverified) || fault.Is(err, fault.Mismatch) || fault.Is(err, fault.NoArtifact):
		fmt.Fprintf(r.log, "%s is there, but: %v\n", r.res.Tag, err)
		return "published, but does not verify", nil
	case err != nil:
		return "", err
	case reason != "":
		return "published, " + reason, nil
	}
	return "published already", nil
}

// reuse decides whether the artifact with this digest is as good as one made
// now: whole, in every place, signed with our key, of this fingerprint, driver
// and runfile. Then a statement that it fits this COS build is all that there
// is to make. The reason says why it is made again nevertheless.
func (r *run) reuse(ctx context.Context, digest string) (reason string, err error) {
	if r.cfg.LoadTest == LoadTestRequire {
		return "load test required", nil
	}
	if r.cfg.DebugSymbols {
		if have, err := r.haveSymbols(ctx, digest); err != nil || !have {
			return "debug symbols wanted", err
		}
	}
	statement, err := sign.KernelMatch(digest, r.kernel.Kernel, r.kernel.Fingerprint, r.res.Driver)
	if err != nil {
		return "", err
	}
	match, err := sign.Bundle(ctx, r.signer, statement)
	if err != nil {
		return "", err
	}
	for _, p := range r.places {
		content, attested, err := r.holds(ctx, p, digest, match)
		if err != nil {
			return "", err
		}
		// With a kernel of its own that boots, a build that nobody attested yet is
		// tested before it is.
		if !attested && r.cfg.LoadTest != LoadTestOff && (r.kernel.Boot != "" || r.kernel.HasVMLinux) {
			return "not tested on this build yet", nil
		}
		r.id = content.Identity
		r.res.Layers = nil
		for _, l := range content.Layers {
			r.res.Layers = append(r.res.Layers, bundle.Layer{Kind: l.Kind, Digest: l.Digest, DiffID: l.DiffID, Size: l.Size})
		}
	}
	r.res.Digest, r.res.Reused, r.bundles = digest, true, [][]byte{match}
	return "", nil
}

// holds verifies what a place has under a digest; attested says that there is
// a statement for this COS build already.
func (r *run) holds(ctx context.Context, p place, digest string, match []byte) (content bundle.Content, attested bool, err error) {
	content, err = publish.Content(ctx, p.repo, digest)
	if err != nil {
		return content, false, err
	}
	attached, err := p.repo.Attached(ctx, digest, trust.ArtifactTypeBundle, trust.Wanted(r.kernel.Kernel)...)
	if err != nil {
		return content, false, err
	}
	expect := trust.Expect{Digest: digest, Kernel: r.kernel.Kernel, Driver: r.res.Driver, Identity: content.Identity}
	verdict, err := r.verifier.Verify(append([][]byte{match}, attached...), expect)
	if err != nil {
		return content, false, err
	}
	if !slices.ContainsFunc(verdict.Materials, func(m trust.Material) bool { return m.Digest == r.release.Digest }) {
		return content, false, fault.Errorf(fault.Mismatch, "%s was not made from runfile %s", digest, r.release.Digest)
	}
	for _, st := range r.verifier.Statements(attached, digest, trust.PredicateProvenance) {
		have, err := carriesOf(st)
		if err != nil {
			return content, false, err
		}
		if !r.takes(have, verdict.Materials) {
			return content, false, fault.Errorf(fault.Mismatch, "the modules of %s are %s, which is not what is asked for", digest, have)
		}
	}
	for _, l := range content.Layers { // a registry may have lost what it promised
		blob, err := p.repo.Blob(ctx, l.Digest, l.Size)
		if err != nil {
			return content, false, err
		}
		if err := blob.Close(); err != nil {
			return content, false, err
		}
	}
	_, err = r.verifier.Verify(attached, expect)
	return content, err == nil, nil
}

// sign makes the image and signs the statements about it.
func (r *run) sign(ctx context.Context) (string, error) {
	var err error
	if r.image, err = bundle.Image(r.id, r.res.Layers); err != nil {
		return "", err
	}
	digest, err := r.image.Digest()
	if err != nil {
		return "", err
	}
	r.res.Digest = digest.String()
	statements, err := r.statements()
	if err != nil {
		return "", err
	}
	if err := r.intact(ctx); err != nil { // the list of contents names their sums
		return "", err
	}
	for _, input := range r.inputs { // what the provenance says they were made of
		if err := r.cfg.Cache.Reread(ctx, input); err != nil {
			return "", err
		}
	}
	for _, statement := range statements {
		b, err := sign.Bundle(ctx, r.signer, statement)
		if err != nil {
			return "", err
		}
		r.bundles = append(r.bundles, b)
	}
	return r.signer.String(), nil
}

// publish sends out what the places do not have yet.
func (r *run) publish(ctx context.Context) (string, error) {
	a := publish.Artifact{Image: r.image, Identity: r.id, Kernel: r.kernel.Kernel, Bundles: r.bundles, Verifier: r.verifier, Log: r.packedLog}
	r.res.Existed = true
	for _, p := range r.places {
		existed, err := true, error(nil)
		if r.res.Reused {
			err = publish.Attest(ctx, p.repo, r.res.Digest, a)
		} else {
			_, existed, err = publish.Publish(ctx, p.repo, a)
		}
		if err != nil {
			// A place that refuses bytes may be right: it compares them with their
			// digests.
			if damaged := r.layersIntact(ctx); damaged != nil {
				err = fmt.Errorf("%w; so: %w", damaged, err)
			}
			return "", fmt.Errorf("publish to %s: %w", p.name, err)
		}
		r.res.Existed = r.res.Existed && existed
		r.res.Repositories = append(r.res.Repositories, p.repo.Name())
	}
	if err := r.publishSymbols(ctx); err != nil {
		return "", err
	}
	if err := r.publishTwins(ctx); err != nil {
		return "", err
	}
	if err := r.giveLabels(ctx); err != nil {
		return "", err
	}
	note := fmt.Sprintf("%s to %d place(s)", r.res.Digest[:19], len(r.places)+len(r.buckets))
	if r.res.Existed {
		note += ", was there already"
	}
	return note, nil
}

// layersIntact tells whether the layers still are what was packed.
func (r *run) layersIntact(ctx context.Context) error {
	if r.res.Reused {
		return nil
	}
	for _, l := range r.res.Layers {
		if err := r.products.Recheck(ctx, l.Path); err != nil {
			return fmt.Errorf("%s layer: %w", l.Kind, err)
		}
	}
	return nil
}

// statements says how the image was made and for which COS build it is good.
func (r *run) statements() ([]sign.Statement, error) {
	facts := Recipes()
	facts["builder"], facts["vermagic"] = r.cfg.Version, r.id.Vermagic
	if name, value, ok := r.carries().fact(); ok {
		facts[name] = value
	}
	facts[factHost] = "sha256:" + r.host
	if r.pahole != "" {
		facts[FactBTF] = r.pahole
	}
	log, err := r.copy.packed()
	if err != nil {
		return nil, err
	}
	r.packedLog = log.bytes
	provenance, err := sign.Provenance(r.res.Digest, sign.BuildFacts{
		Kernel: r.kernel.Kernel, Fingerprint: r.kernel.Fingerprint, Driver: r.res.Driver, Materials: r.materials(),
		BuilderID: r.cfg.BuilderID, InvocationID: "urn:uuid:" + uuid.NewString(), LogDigest: log.digest,
		Started: r.started, Finished: time.Now().UTC(), Facts: facts,
	})
	if err != nil {
		return nil, err
	}
	match, err := sign.KernelMatch(r.res.Digest, r.kernel.Kernel, r.kernel.Fingerprint, r.res.Driver)
	if err != nil {
		return nil, err
	}
	tested, err := sign.TestResult(r.res.Digest, r.testFacts())
	if err != nil {
		return nil, err
	}
	doc, err := sbom.JSON(sbom.Facts{
		Digest: r.res.Digest, Kernel: r.kernel.Kernel, Fingerprint: r.kernel.Fingerprint, Driver: r.res.Driver,
		Materials: r.materials(), Layers: r.res.Layers, Modules: r.modules,
	})
	if err != nil {
		return nil, err
	}
	contents, err := sign.SBOM(r.res.Digest, r.res.Driver, doc)
	if err != nil {
		return nil, err
	}
	all := []sign.Statement{provenance, match, tested, contents}
	if r.gpus != nil {
		supported, err := gpus.Statement(r.res.Digest, r.res.Driver, r.gpus)
		switch {
		case fault.Is(err, fault.Unsupported): // too long for a statement
			r.say("sign")(err.Error())
		case err != nil:
			return nil, err
		default:
			all = append(all, supported)
		}
	}
	return all, nil
}

// materials are all inputs, as the provenance names them.
func (r *run) materials() []sign.Material {
	var all []sign.Material
	inputs := slices.Concat(r.kernel.Materials, r.release.Materials)
	switch c := r.carries(); {
	case c.modules != "":
		inputs = append(inputs, r.prebuilt.Materials...)
	case c.google != "":
		inputs = append(inputs, r.google.materials...)
	}
	for _, m := range inputs {
		all = append(all, sign.Material{Name: m.Name, URI: m.URI, Digest: m.Digest})
	}
	return all
}
