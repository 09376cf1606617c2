package sign

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	provenance "github.com/in-toto/attestation/go/predicates/provenance/v1"
	intoto "github.com/in-toto/attestation/go/v1"
	protocommon "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	sgsign "github.com/sigstore/sigstore-go/pkg/sign"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// Material is one input of a build.
type Material struct {
	Name, URI string
	Digest    string // sha256:...
	// BuildID is the GNU build id of an ELF file, in hex, or "". Only [TestResult] writes it.
	BuildID string
}

// BuildFacts is the content of a build's provenance. The caller sets times and ids: this package reads no clock.
type BuildFacts struct {
	Kernel      target.Kernel
	Fingerprint target.Fingerprint
	Driver      target.Driver
	Materials   []Material
	// BuilderID is the URI of the builder. A node's policy may accept only certain builders.
	BuilderID string
	// InvocationID is the ID of this run of the builder. If it is empty, the provenance has no such field.
	InvocationID string
	// Started and Finished are the times of the build's start and end. A zero time is left out.
	Started, Finished time.Time
	// LogDigest is the digest of the build log. If it is empty, the provenance does not refer to a log.
	LogDigest string
	// Facts are further facts, such as the vermagic and the version of each build step's code. They become internal
	// parameters.
	Facts map[string]string
}

// Statement is an in-toto statement that is ready to be signed.
type Statement struct {
	PredicateType string
	payload       []byte
}

// JSON returns the statement as JSON.
func (s Statement) JSON() []byte { return s.payload }

// Provenance makes the SLSA v1 provenance of the artifact with this manifest digest.
func Provenance(digest string, f BuildFacts) (Statement, error) {
	s, err := newProvenance(digest, f)
	if err != nil {
		return Statement{}, fmt.Errorf("make the statement of the provenance: %w", err)
	}
	return s, nil
}

func newProvenance(digest string, f BuildFacts) (Statement, error) {
	external, err := toStruct(trust.Parameters{Kernel: f.Kernel, Fingerprint: f.Fingerprint, Driver: f.Driver})
	if err != nil {
		return Statement{}, err
	}
	p := &provenance.Provenance{
		BuildDefinition: &provenance.BuildDefinition{BuildType: trust.BuildType, ExternalParameters: external},
		RunDetails: &provenance.RunDetails{
			Builder: &provenance.Builder{Id: f.BuilderID},
			Metadata: &provenance.BuildMetadata{InvocationId: f.InvocationID, StartedOn: timestamp(f.Started),
				FinishedOn: timestamp(f.Finished)},
		},
	}
	if len(f.Facts) > 0 {
		if p.BuildDefinition.InternalParameters, err = toStruct(f.Facts); err != nil {
			return Statement{}, err
		}
	}
	for _, m := range f.Materials {
		rd, err := resource(m.Name, m.URI, m.Digest)
		if err != nil {
			return Statement{}, fmt.Errorf("add the input %s to the statement: %w", m.Name, err)
		}
		p.BuildDefinition.ResolvedDependencies = append(p.BuildDefinition.ResolvedDependencies, rd)
	}
	if f.LogDigest != "" {
		rd, err := resource("build log", "", f.LogDigest)
		if err != nil {
			return Statement{}, fmt.Errorf("add the build log to the statement: %w", err)
		}
		p.RunDetails.Byproducts = append(p.RunDetails.Byproducts, rd)
	}
	if err := p.Validate(); err != nil {
		return Statement{}, err
	}
	return newStatement(digest, f.Driver, trust.PredicateProvenance, p)
}

// KernelMatch makes the statement that the artifact with this manifest digest fits this COS build, whose kernel has the
// given ABI fingerprint.
func KernelMatch(digest string, k target.Kernel, fp target.Fingerprint, d target.Driver) (Statement, error) {
	predicate, err := toStruct(trust.KernelMatch{Kernel: k, Fingerprint: fp})
	if err != nil {
		return Statement{}, fmt.Errorf("make the statement of the kernel match: %w", err)
	}
	s, err := newStatement(digest, d, trust.PredicateKernelMatch, predicate)
	if err != nil {
		return Statement{}, fmt.Errorf("make the statement of the kernel match: %w", err)
	}
	return s, nil
}

func newStatement(digest string, d target.Driver, predicateType string, predicate proto.Message) (Statement, error) {
	body := &structpb.Struct{}
	raw, err := protojson.Marshal(predicate)
	if err != nil {
		return Statement{}, err
	}
	if err := protojson.Unmarshal(raw, body); err != nil {
		return Statement{}, err
	}
	return statementOf("nvidia-"+d.String(), digest, predicateType, body)
}

// marshal prints a message as JSON. It removes protojson's random white space, so equal messages give equal bytes.
func marshal(m proto.Message) ([]byte, error) {
	raw, err := protojson.Marshal(m)
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	if err := json.Compact(&buf, raw); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

func toStruct(v any) (*structpb.Struct, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	s := &structpb.Struct{}
	return s, s.UnmarshalJSON(raw)
}

func resource(name, uri, digest string) (*intoto.ResourceDescriptor, error) {
	sum, ok := strings.CutPrefix(digest, "sha256:")
	if !ok || len(sum) != 2*sha256.Size {
		return nil, fmt.Errorf("digest %.80q: want sha256: and 64 hex digits", digest)
	}
	return &intoto.ResourceDescriptor{Name: name, Uri: uri, Digest: map[string]string{"sha256": sum}}, nil
}

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t.UTC())
}

// Bundle signs a statement into a Sigstore bundle v0.3: a DSSE envelope, and a hint about which key made the signature.
// It verifies the result as a node does.
//
// With a lasting key, the bundle has no certificate, timestamp or log entry, and verifies offline while the key is
// trusted. A keyless bundle has a certificate and a proof of the time.
func Bundle(ctx context.Context, s *Signer, st Statement) ([]byte, error) {
	raw, err := newBundle(ctx, s, st)
	if err != nil {
		return nil, fmt.Errorf("sign the statement of type %s: %w", st.PredicateType, err)
	}
	return raw, nil
}

func newBundle(ctx context.Context, s *Signer, st Statement) ([]byte, error) {
	verifier, err := s.Verifier()
	if err != nil {
		return nil, err
	}
	var key sgsign.Keypair = keypair{s}
	options, explain := sgsign.BundleOptions{Context: ctx}, explainKey
	if s.keyless != nil {
		explain = explainService
		if key, options, err = s.keyless.bundleOptions(ctx); err != nil {
			return nil, err
		}
	}
	b, err := sgsign.Bundle(&sgsign.DSSEData{Data: st.payload, PayloadType: "application/vnd.in-toto+json"}, key, options)
	if err != nil {
		return nil, explain(ctx, err)
	}
	raw, err := marshal(b)
	if err != nil {
		return nil, err
	}
	if _, err := verifier.Statement(raw); err != nil {
		// The key in the KMS may have been replaced after it was loaded. The next try loads the new key.
		kind := fault.Transient
		if s.keyless != nil {
			// The trusted root does not have a service that took part in this signature, or the identity token now names
			// another signer than at the start. A retry does not help.
			kind = fault.Usage
		}
		return nil, fault.Wrap(kind, fmt.Errorf("verify the new signature: %w", err), "")
	}
	return raw, nil
}

func explainKey(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fault.Wrap(fault.Transient, err, "check that the signing key can be reached")
}

// keypair adapts a Signer to the bundle library.
type keypair struct{ s *Signer }

func (k keypair) GetHashAlgorithm() protocommon.HashAlgorithm { return k.s.details.GetProtoHashType() }
func (k keypair) GetSigningAlgorithm() protocommon.PublicKeyDetails {
	return k.s.details.GetSignatureAlgorithm()
}
func (k keypair) GetHint() []byte { return []byte(k.s.key.Hint()) }

// GetKeyAlgorithm is used by certificate authorities only.
func (k keypair) GetKeyAlgorithm() string        { return "" }
func (k keypair) GetPublicKey() crypto.PublicKey { return k.s.pub }

func (k keypair) GetPublicKeyPem() (string, error) {
	text, err := k.s.PublicPEM()
	return string(text), err
}

// SignData returns no digest, because a DSSE envelope has no field for it.
func (k keypair) SignData(ctx context.Context, data []byte) (sig, digest []byte, err error) {
	sig, err = k.s.sign(ctx, data)
	return sig, nil, err
}
