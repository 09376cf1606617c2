package sign

import (
	"fmt"

	provenance "github.com/in-toto/attestation/go/predicates/provenance/v1"
	intoto "github.com/in-toto/attestation/go/v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/prebake/prebake/pkg/trust"
)

// buildTypeRelease is the build type of a release's provenance. docs/decisions/0033-releases.md describes it.
const buildTypeRelease = "https://prebake.dev/release/v1"

// ReleaseFacts is the content of a release's provenance. It has no time: the same source gives the same statement.
type ReleaseFacts struct {
	Version string
	// Commit is the commit of the source, in hexadecimal as git prints it.
	Commit string
	// Toolchain is the Go version that compiled the release.
	Toolchain string
	// BuilderID is the URI of the builder that made the release.
	BuilderID string
	// Files are the release's files and images. Inputs are all inputs except the source.
	Files, Inputs []Material
}

// Release makes the SLSA v1 provenance of a release's files.
func Release(f ReleaseFacts) (Statement, error) {
	s, err := newRelease(f)
	if err != nil {
		return Statement{}, fmt.Errorf("make the provenance of release %s: %w", f.Version, err)
	}
	return s, nil
}

func newRelease(f ReleaseFacts) (Statement, error) {
	external, err := toStruct(map[string]string{"version": f.Version, "commit": f.Commit})
	if err != nil {
		return Statement{}, err
	}
	internal, err := toStruct(map[string]string{"go": f.Toolchain})
	if err != nil {
		return Statement{}, err
	}
	p := &provenance.Provenance{
		BuildDefinition: &provenance.BuildDefinition{
			BuildType: buildTypeRelease, ExternalParameters: external, InternalParameters: internal,
		},
		RunDetails: &provenance.RunDetails{Builder: &provenance.Builder{Id: f.BuilderID}},
	}
	// The key gitCommit is defined in in-toto's digest_set.md.
	source := &intoto.ResourceDescriptor{Name: "source", Digest: map[string]string{"gitCommit": f.Commit}}
	p.BuildDefinition.ResolvedDependencies = append(p.BuildDefinition.ResolvedDependencies, source)
	for _, m := range f.Inputs {
		rd, err := resource(m.Name, m.URI, m.Digest)
		if err != nil {
			return Statement{}, fmt.Errorf("add the input %s to the statement: %w", m.Name, err)
		}
		p.BuildDefinition.ResolvedDependencies = append(p.BuildDefinition.ResolvedDependencies, rd)
	}
	if err := p.Validate(); err != nil {
		return Statement{}, err
	}
	raw, err := protojson.Marshal(p)
	if err != nil {
		return Statement{}, err
	}
	predicate := &structpb.Struct{}
	if err := protojson.Unmarshal(raw, predicate); err != nil {
		return Statement{}, err
	}
	st := &intoto.Statement{
		Type: intoto.StatementTypeUri, PredicateType: trust.PredicateProvenance, Predicate: predicate,
	}
	for _, m := range f.Files {
		rd, err := resource(m.Name, m.URI, m.Digest)
		if err != nil {
			return Statement{}, fmt.Errorf("add the file %s to the statement: %w", m.Name, err)
		}
		st.Subject = append(st.Subject, rd)
	}
	if err := st.Validate(); err != nil {
		return Statement{}, err
	}
	payload, err := marshal(st)
	if err != nil {
		return Statement{}, err
	}
	return Statement{PredicateType: trust.PredicateProvenance, payload: payload}, nil
}
