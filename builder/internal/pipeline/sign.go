package pipeline

import (
	"context"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/uuid"

	"github.com/prebake/prebake/builder/internal/gpus"
	"github.com/prebake/prebake/builder/internal/sbom"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
)

// factHost is the name of a fact in the provenance: the digest of the host's programs that the build ran.
const factHost = "host-tools"

// artifact is an image and its statements, ready to be published.
type artifact struct {
	digest   string
	identity bundle.Identity
	layers   []bundle.Layer
	bundles  [][]byte // the signed statements, as Sigstore bundles
	// image and log are nil if the destinations have the artifact already. log is compressed.
	image v1.Image
	log   []byte
}

// wasPublished reports whether the destinations had the artifact before this build.
func (a *artifact) wasPublished() bool { return a.image == nil }

// sign makes the image and signs the statements about it.
func (r *run) sign(ctx context.Context, in *inputs, to *publication, m *modules, tested testOutcome,
	layers []bundle.Layer) (_ *artifact, note string, err error) {
	a := &artifact{identity: m.identity, layers: layers}
	if a.image, err = bundle.Image(m.identity, layers); err != nil {
		return nil, "", err
	}
	digest, err := a.image.Digest()
	if err != nil {
		return nil, "", err
	}
	a.digest = digest.String()
	r.res.Digest = a.digest
	log, err := r.kept.pack()
	if err != nil {
		return nil, "", err
	}
	a.log = log.bytes
	statements, err := r.statements(in, to, m, tested, a, log.digest)
	if err != nil {
		return nil, "", err
	}
	if err := r.checkIntact(ctx, m); err != nil { // the SBOM contains the modules' checksums
		return nil, "", err
	}
	for _, input := range m.madeOf { // the provenance lists these inputs
		if err := r.cfg.Cache.Reread(ctx, input); err != nil {
			return nil, "", err
		}
	}
	for _, statement := range statements {
		b, err := sign.Bundle(ctx, to.signer, statement)
		if err != nil {
			return nil, "", err
		}
		a.bundles = append(a.bundles, b)
	}
	return a, to.signer.String(), nil
}

// statements returns the statements about the image, in the order in which they are attached: its provenance, test
// result, contents, GPUs and kernel match. The kernel match comes last, because a later run counts an artifact with a
// kernel match as complete.
func (r *run) statements(in *inputs, to *publication, m *modules, tested testOutcome, a *artifact,
	logDigest string) ([]sign.Statement, error) {
	facts := Recipes()
	facts[FactPack], facts[factBuilder], facts["vermagic"] = r.recipe, r.cfg.Version, m.identity.Vermagic
	if name, value, ok := m.signer.fact(); ok {
		facts[name] = value
	}
	facts[factHost] = "sha256:" + in.host
	if in.pahole != "" {
		facts[FactBTF] = in.pahole
	}
	materials := in.materials(m.signer)
	provenance, err := sign.Provenance(a.digest, sign.BuildFacts{
		Kernel: in.kernel.Kernel, Fingerprint: in.kernel.Fingerprint, Driver: in.driver, Materials: materials,
		BuilderID: r.cfg.BuilderID, InvocationID: "urn:uuid:" + uuid.NewString(), LogDigest: logDigest,
		Started: r.started, Finished: time.Now().UTC(), Facts: facts,
	})
	if err != nil {
		return nil, err
	}
	match, err := sign.KernelMatch(a.digest, in.kernel.Kernel, in.kernel.Fingerprint, in.driver)
	if err != nil {
		return nil, err
	}
	result, err := sign.TestResult(a.digest, testFacts(in, m, tested))
	if err != nil {
		return nil, err
	}
	doc, err := sbom.JSON(sbom.Facts{
		Digest: a.digest, Kernel: in.kernel.Kernel, Fingerprint: in.kernel.Fingerprint, Driver: in.driver,
		Materials: materials, Layers: a.layers, Modules: m.files,
	})
	if err != nil {
		return nil, err
	}
	contents, err := sign.SBOM(a.digest, in.driver, doc)
	if err != nil {
		return nil, err
	}
	all := []sign.Statement{provenance, result, contents}
	if to.gpus != nil {
		supported, err := gpus.Statement(a.digest, in.driver, to.gpus)
		switch {
		case fault.Is(err, fault.Unsupported): // the list is too long for a statement
			r.progress("sign")(err.Error())
		case err != nil:
			return nil, err
		default:
			all = append(all, supported)
		}
	}
	return append(all, match), nil
}
