package trust

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"google.golang.org/protobuf/proto"

	"github.com/prebake/prebake/pkg/fault"
)

// Errors about a Sigstore bundle itself. Compare with errors.Is.
var (
	ErrMalformed  = errors.New("malformed attestation")
	ErrUnknownKey = errors.New("the statement is signed by an unknown key")
	ErrChanged    = errors.New("the signature is not valid: the payload or the signature changed after signing")
)

// Bounds on the Sigstore bundles that are read. A registry may let anybody attach bundles.
const (
	// MaxBundles is the sum of: 64 bundles that match [Wanted], 64 without labels, and 16 of the caller.
	MaxBundles    = 64 + 64 + 16
	MaxBundleSize = 1 << 20
	maxSubjects   = 64
)

// statementType is the only type of in-toto statement that is accepted.
const statementType = "https://in-toto.io/Statement/v1"

// Verifier checks Sigstore bundles against a fixed set of public keys and certificate identities. It uses no network,
// no clock and no files.
type Verifier struct {
	policy       Policy
	keys         map[string]PublicKey // by hint
	verifier     *verify.Verifier
	certificates *certificates // nil if the policy trusts no certificates
}

// Policy says whose signatures are trusted. It needs at least one key or certificate identity. Without Roles and Rules,
// one signature under each required statement is enough.
type Policy struct {
	// Keys are the public keys of the publishers.
	Keys []PublicKey
	// Root verifies certificates. Identities are the names that they may have. Root and Identities are either both set
	// or both empty.
	Root       *Root
	Identities []Identity
	// Roles and Rules replace Keys and Identities if several parties must sign. There must be rules for provenance and
	// kernel match.
	Roles []Role
	Rules []Rule
	// Builders are the builder IDs that the provenance may have. Sources are the prefixes that the URIs of inputs may
	// have. An empty list allows any value.
	Builders, Sources []string
	// MaxAge is the maximum age of an artifact's build when a node first accepts the artifact. Zero allows any age.
	MaxAge time.Duration
	// MinVersions are the oldest driver versions that are accepted, one for each branch.
	MinVersions []string
	// Revoked are the digests of artifacts that are refused, whoever signed them.
	Revoked []string
	// LoadTest says whether an artifact needs a passed load test. The zero value does not demand one.
	LoadTest LoadTestPolicy
	// Listing can refuse artifacts in addition to the policy. Nil means that there is no listing.
	Listing Listing
}

// Listing decides about an artifact by a list that is not part of the policy, such as a snapshot.
type Listing interface {
	// Check returns an error if the artifact with this digest must not be used. now is the time at which a new artifact is
	// accepted. It is zero for an artifact that was accepted before.
	Check(digest string, now time.Time) (detail string, err error)
}

// NewVerifier returns a verifier for this policy.
func NewVerifier(p Policy) (*Verifier, error) {
	unsettled := p.settle()
	if len(p.Keys)+len(p.Identities) == 0 {
		return nil, fault.New(fault.Usage, "verify artifacts: no public key is configured",
			"configure the publisher's public key, or a trusted root and the publisher's certificate identity")
	}
	if (p.Root == nil) != (len(p.Identities) == 0) {
		return nil, fault.New(fault.Usage,
			"verify artifacts: a trusted root needs a certificate identity, and a certificate identity needs a trusted root",
			"configure both, or neither of them")
	}
	if unsettled != nil {
		return nil, unsettled
	}
	v := &Verifier{policy: p, keys: map[string]PublicKey{}}
	byHint := map[string]*root.ExpiringKey{}
	for _, k := range p.Keys {
		sv, err := k.verifier()
		if err != nil {
			return nil, fault.Errorf(fault.Usage, "verify artifacts: key %s: %w", k.ID(), err)
		}
		v.keys[k.Hint()] = k
		byHint[k.Hint()] = root.NewExpiringKey(sv, time.Time{}, time.Time{})
	}
	var err error
	// The keys are long-lived and there is no log, so there is no time to verify and no service to ask.
	v.verifier, err = verify.NewVerifier(root.NewTrustedPublicKeyMaterialFromMapping(byHint),
		verify.WithNoObserverTimestamps())
	if err != nil {
		return nil, fmt.Errorf("verify artifacts: %w", err)
	}
	if p.Root != nil {
		if v.certificates, err = newCertificates(p); err != nil {
			return nil, fmt.Errorf("verify artifacts: %w", err)
		}
	}
	return v, nil
}

// Statement is an in-toto statement with a valid signature.
type Statement struct {
	// KeyID is the [PublicKey.ID] of the signer's key. Identity is the name in the signer's certificate. One of KeyID
	// and Identity is empty.
	KeyID    string
	Identity string
	// Subjects are the digests that the statement is about, as sha256:HEX.
	Subjects      []string
	PredicateType string
	// Predicate is JSON.
	Predicate []byte

	signer Identity // of which the field Identity is the formatted text
	hint   string   // [PublicKey.Hint] of the signer's key
}

// About reports whether the statement is about this digest.
func (s *Statement) About(digest string) bool {
	for _, d := range s.Subjects {
		if d == digest {
			return true
		}
	}
	return false
}

// Statements returns the statements that have a valid signature, this digest as a subject, and this predicate type. It
// examines only the first [MaxBundles] bundles.
func (v *Verifier) Statements(bundles [][]byte, digest, predicateType string) []*Statement {
	var all []*Statement
	for _, data := range bundles[:min(len(bundles), MaxBundles)] {
		if st, err := v.Statement(data); err == nil && st.PredicateType == predicateType && st.About(digest) {
			all = append(all, st)
		}
	}
	return all
}

// Statement verifies one bundle's signature and returns the signed statement. It does not check the statement's
// content.
func (v *Verifier) Statement(data []byte) (*Statement, error) {
	st, err := v.statement(data)
	if err != nil {
		return nil, fault.Wrap(fault.Unverified, err, hintFor(err))
	}
	return st, nil
}

// Useful returns a callback for AttachedIf of package registry. The callback returns "" for a bundle that v does not
// verify or that is about another artifact. It names any other bundle by signer, type and content, so copies have the
// same name.
func Useful(v interface {
	Statement(bundle []byte) (*Statement, error)
}, digest string) func(bundle []byte) (name string) {
	return func(bundle []byte) string {
		st, err := v.Statement(bundle)
		if err != nil || !st.About(digest) {
			return ""
		}
		sum := sha256.Sum256(st.Predicate)
		return st.Signer() + " " + st.PredicateType + " " + hex.EncodeToString(sum[:])
	}
}

func hintFor(err error) string {
	switch {
	case errors.Is(err, ErrUnknownKey):
		return "configure the public key of the publisher of this artifact, if you trust the publisher"
	case errors.Is(err, ErrUnknownIdentity):
		return "configure the subject and the issuer of the certificate as a certificate identity, if you trust the signer"
	case errors.Is(err, ErrOtherRoot):
		return "configure the trusted root of the Sigstore deployment that issued the certificate, if you trust that " +
			"deployment"
	case errors.Is(err, ErrNoTime):
		return "sign the artifact again, with a timestamp authority or a log that is in the trusted root"
	}
	return ""
}

func (v *Verifier) statement(data []byte) (*Statement, error) {
	if len(data) > MaxBundleSize {
		return nil, fmt.Errorf("%w: the bundle has %d bytes; want at most %d bytes", ErrMalformed, len(data),
			MaxBundleSize)
	}
	var b bundle.Bundle
	if err := b.UnmarshalJSON(data); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, shortError{err})
	}
	if b.MediaType != ArtifactTypeBundle {
		return nil, fmt.Errorf("%w: the bundle has media type %.80q; want %s", ErrMalformed, b.MediaType, ArtifactTypeBundle)
	}
	if env := b.GetDsseEnvelope(); env == nil || env.GetPayloadType() != bundle.IntotoMediaType ||
		len(env.GetSignatures()) != 1 {
		return nil, fmt.Errorf("%w: want an in-toto statement with one signature", ErrMalformed)
	}
	content, err := b.VerificationContent()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, shortError{err})
	}
	pub := content.PublicKey()
	if pub == nil {
		if v.certificates == nil {
			return nil, fmt.Errorf("%w: the statement is signed with a certificate; only keys are trusted (%s)", ErrUnknownKey,
				ids(v.policy.Keys))
		}
		return v.certificates.statement(&b, content.Certificate())
	}
	key, ok := v.keys[pub.Hint()]
	if !ok {
		return nil, fmt.Errorf("%w: the signer is key %s; trusted signers are %s", ErrUnknownKey, hintID(pub.Hint()),
			v.trustedSigners())
	}
	// The library does not compare the subject here; [Verifier.Verify] does, for a better error.
	result, err := v.verifier.Verify(&b, verify.NewPolicy(verify.WithoutArtifactUnsafe(), verify.WithKey()))
	if err != nil {
		return nil, fmt.Errorf("%w (key %s)", ErrChanged, key.ID())
	}
	return readStatement(Statement{KeyID: key.ID(), hint: key.Hint()}, result)
}

// trustedSigners returns the trusted keys and certificate identities, for messages.
func (v *Verifier) trustedSigners() string {
	all := ids(v.policy.Keys)
	switch {
	case v.certificates == nil:
		return all
	case all == "":
		return v.certificates.identities
	}
	return all + ", " + v.certificates.identities
}

// readStatement fills st with the content of a verified statement.
func readStatement(st Statement, result *verify.VerificationResult) (*Statement, error) {
	in := result.Statement
	if in == nil || in.GetType() != statementType {
		return nil, fmt.Errorf("%w: the payload is not an in-toto statement v1", ErrMalformed)
	}
	if len(in.GetSubject()) > maxSubjects {
		return nil, fmt.Errorf("%w: the statement has %d subjects; want at most %d subjects", ErrMalformed,
			len(in.GetSubject()),
			maxSubjects)
	}
	st.PredicateType = in.GetPredicateType()
	for _, s := range in.GetSubject() {
		if sum := s.GetDigest()["sha256"]; sum != "" {
			st.Subjects = append(st.Subjects, "sha256:"+sum)
		}
	}
	var err error
	if in.GetPredicate() == nil || proto.Size(in.GetPredicate()) == 0 {
		return nil, fmt.Errorf("%w: the statement has no predicate", ErrMalformed)
	}
	if st.Predicate, err = in.GetPredicate().MarshalJSON(); err != nil {
		return nil, fmt.Errorf("%w: encode the predicate: %w", ErrMalformed, shortError{err})
	}
	return &st, nil
}

// shortError is an error whose text is quoted and cut to a bounded length, because it may have untrusted bytes.
type shortError struct{ err error }

func (c shortError) Error() string {
	text := strings.ReplaceAll(c.err.Error(), "\u00a0", " ") // protobuf varies its white space
	if len(text) > 200 {
		text = text[:200] + "..."
	}
	return fmt.Sprintf("%q", text)
}

func (c shortError) Unwrap() error { return c.err }
