package trust

import (
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

// What can be wrong with a bundle itself. Each comes with its own text; these
// are for errors.Is.
var (
	ErrMalformed  = errors.New("malformed bundle")
	ErrUnknownKey = errors.New("signed by an unknown key")
	ErrChanged    = errors.New("signature does not hold: payload or signature changed after signing")
)

// Bounds of what is looked at. A registry may let others attach whatever they
// like, so neither number nor size may cost much.
const (
	// MaxBundles has room for what [Wanted] finds, as much that has no labels, and
	// the caller's own.
	MaxBundles    = 64 + 64 + 16
	MaxBundleSize = 1 << 20
	maxSubjects   = 64
)

// statementType is the only type of in-toto statement that is read.
const statementType = "https://in-toto.io/Statement/v1"

// Verifier checks bundles against a fixed set of public keys and identities.
// It needs no network, no clock and no files.
type Verifier struct {
	policy       Policy
	keys         map[string]PublicKey // by hint
	verifier     *verify.Verifier
	certificates *certificates // nil trusts none
}

// Policy says whom to trust: at least one key or identity. One that signed is
// enough.
type Policy struct {
	// Keys are the public keys of those who may publish.
	Keys []PublicKey
	// Root is what certificates are judged by, and Identities are those whom they
	// may name. The two go together.
	Root       *Root
	Identities []Identity
	// Roles and Rules replace Keys and Identities where more than one party has a say:
	// rules for provenance and kernel match are needed, others may demand more.
	Roles []Role
	Rules []Rule
	// Builders are the builder ids that provenance may name; none is any. Sources are the
	// beginnings of the URIs that its inputs may have; none is any.
	Builders, Sources []string
	// MaxAge is how long ago something new may have been built; zero is any.
	MaxAge time.Duration
	// MinVersions are the oldest driver versions that are taken, one for each branch.
	MinVersions []string
	// Revoked are digests of artifacts that are refused no matter who signed them.
	Revoked []string
	// LoadTest says whether artifacts need one; the zero value takes any.
	LoadTest LoadTestPolicy
	// Listing is asked about each artifact, too; nil means not.
	Listing Listing
}

// Listing says what a list from elsewhere makes of an artifact.
type Listing interface {
	// Check returns why the artifact of this digest must not be used; nil means that it may. now
	// is when something new is taken, and zero for what was taken before.
	Check(digest string, now time.Time) (detail string, err error)
}

// NewVerifier returns a verifier for this policy.
func NewVerifier(p Policy) (*Verifier, error) {
	unsettled := p.settle()
	if len(p.Keys)+len(p.Identities) == 0 {
		return nil, fault.New(fault.Usage, "verify artifacts: no public key is configured",
			"configure the publisher's public key, or a trusted root and the publisher's identity")
	}
	if (p.Root == nil) != (len(p.Identities) == 0) {
		return nil, fault.New(fault.Usage,
			"verify artifacts: a trusted root and the identities of signers go together",
			"configure both, or neither")
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
	// Long-lived keys and no log: there is no time to verify, and no service
	// to ask.
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

// Statement is an in-toto statement whose signature holds.
type Statement struct {
	// KeyID is the [PublicKey.ID] of the signer, and Identity whom the signer's
	// certificate names. One of the two is empty.
	KeyID    string
	Identity string
	// Subjects are the digests that the statement is about.
	Subjects      []string
	PredicateType string
	// Predicate is JSON.
	Predicate []byte

	signer Identity // the same as Identity
	hint   string   // the whole digest of the key
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

// Statements returns those of the bundles that hold, are about this digest and
// have this predicate type, for callers who read more than [Verifier.Verify]
// decides by. Only the first [MaxBundles] are examined.
func (v *Verifier) Statements(bundles [][]byte, digest, predicateType string) []*Statement {
	var all []*Statement
	for _, data := range bundles[:min(len(bundles), MaxBundles)] {
		if st, err := v.Statement(data); err == nil && st.PredicateType == predicateType && st.About(digest) {
			all = append(all, st)
		}
	}
	return all
}

// Statement checks one bundle's signature and returns what was signed. It
// says nothing about what the statement is worth.
func (v *Verifier) Statement(data []byte) (*Statement, error) {
	st, err := v.statement(data)
	if err != nil {
		return nil, fault.Wrap(fault.Unverified, err, hintFor(err))
	}
	return st, nil
}

func hintFor(err error) string {
	switch {
	case errors.Is(err, ErrUnknownKey):
		return "configure the public key of the publisher of this artifact, if you trust them"
	case errors.Is(err, ErrUnknownIdentity):
		return "configure the name and the issuer that are in the certificate, if you trust them"
	case errors.Is(err, ErrOtherRoot):
		return "configure the trusted root of the Sigstore deployment that the publisher's certificate is from, if you " +
			"trust it"
	case errors.Is(err, ErrNoTime):
		return "have it signed again with a timestamp authority, or a log, that the trusted root names"
	}
	return ""
}

func (v *Verifier) statement(data []byte) (*Statement, error) {
	if len(data) > MaxBundleSize {
		return nil, fmt.Errorf("%w: %d bytes; at most %d are read", ErrMalformed, len(data), MaxBundleSize)
	}
	var b bundle.Bundle
	if err := b.UnmarshalJSON(data); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, cut{err})
	}
	if b.MediaType != ArtifactTypeBundle {
		return nil, fmt.Errorf("%w: media type %.80q; want %s", ErrMalformed, b.MediaType, ArtifactTypeBundle)
	}
	if env := b.GetDsseEnvelope(); env == nil || env.GetPayloadType() != bundle.IntotoMediaType ||
		len(env.GetSignatures()) != 1 {
		return nil, fmt.Errorf("%w: not an in-toto statement with one signature", ErrMalformed)
	}
	content, err := b.VerificationContent()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, cut{err})
	}
	pub := content.PublicKey()
	if pub == nil {
		if v.certificates == nil {
			return nil, fmt.Errorf("%w: signed with a certificate; only keys are trusted (%s)", ErrUnknownKey,
				ids(v.policy.Keys))
		}
		return v.certificates.statement(&b, content.Certificate())
	}
	key, ok := v.keys[pub.Hint()]
	if !ok {
		return nil, fmt.Errorf("%w: key %s; trusted are %s", ErrUnknownKey, hintID(pub.Hint()), v.trusted())
	}
	// The subject is compared by the caller, who can then say what it is
	// instead; nothing is returned here before the signature holds.
	result, err := v.verifier.Verify(&b, verify.NewPolicy(verify.WithoutArtifactUnsafe(), verify.WithKey()))
	if err != nil {
		return nil, fmt.Errorf("%w (key %s)", ErrChanged, key.ID())
	}
	return readStatement(Statement{KeyID: key.ID(), hint: key.Hint()}, result)
}

// trusted names everybody, for people.
func (v *Verifier) trusted() string {
	all := ids(v.policy.Keys)
	switch {
	case v.certificates == nil:
		return all
	case all == "":
		return v.certificates.identities
	}
	return all + ", " + v.certificates.identities
}

// readStatement fills in what was said by a signer who is known.
func readStatement(st Statement, result *verify.VerificationResult) (*Statement, error) {
	in := result.Statement
	if in == nil || in.GetType() != statementType {
		return nil, fmt.Errorf("%w: payload is not an in-toto statement v1", ErrMalformed)
	}
	if len(in.GetSubject()) > maxSubjects {
		return nil, fmt.Errorf("%w: %d subjects; at most %d are read", ErrMalformed, len(in.GetSubject()), maxSubjects)
	}
	st.PredicateType = in.GetPredicateType()
	for _, s := range in.GetSubject() {
		if sum := s.GetDigest()["sha256"]; sum != "" {
			st.Subjects = append(st.Subjects, "sha256:"+sum)
		}
	}
	var err error
	if in.GetPredicate() == nil || proto.Size(in.GetPredicate()) == 0 {
		return nil, fmt.Errorf("%w: statement without a predicate", ErrMalformed)
	}
	if st.Predicate, err = in.GetPredicate().MarshalJSON(); err != nil {
		return nil, fmt.Errorf("%w: predicate: %w", ErrMalformed, cut{err})
	}
	return &st, nil
}

// cut shortens the text of an error that may quote foreign bytes.
type cut struct{ err error }

func (c cut) Error() string {
	text := strings.ReplaceAll(c.err.Error(), "\u00a0", " ") // protobuf varies its white space
	if len(text) > 200 {
		text = text[:200] + "..."
	}
	return fmt.Sprintf("%q", text)
}

func (c cut) Unwrap() error { return c.err }
