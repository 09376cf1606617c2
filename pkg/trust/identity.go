package trust

import (
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/fulcio/certificate"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"

	"github.com/prebake/prebake/pkg/fault"
)

// Errors about a Sigstore bundle that was signed with a short-lived certificate. Compare with errors.Is.
var (
	ErrUnknownIdentity = errors.New("the statement is signed by an unknown certificate identity")
	ErrOtherRoot       = errors.New("the signer's certificate does not belong to the trusted root")
	ErrNoTime          = errors.New("no trusted timestamp shows that the certificate was valid at the time of signing")
)

// Root is the root of trust of a Sigstore deployment: its certificate authorities, timestamp authorities and logs.
type Root struct{ material *root.TrustedRoot }

const (
	maxRootFile = 1 << 20
	hintRoot    = "give a Sigstore trusted_root.json; to make one: cosign trusted-root create"
)

// ParseRoot parses a trusted_root.json, in the format of Sigstore's root of trust. `cosign trusted-root create` writes
// it.
func ParseRoot(text []byte) (*Root, error) {
	r, err := parseRoot(text)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("read trusted root: %w", err), hintRoot)
	}
	return r, nil
}

// ReadRoot reads a trusted_root.json from a file.
func ReadRoot(file string) (*Root, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("read trusted root: %w", err), hintRoot)
	}
	return ParseRoot(text)
}

func parseRoot(text []byte) (*Root, error) {
	if len(text) > maxRootFile {
		return nil, fmt.Errorf("the file has %d bytes; want at most %d bytes", len(text), maxRootFile)
	}
	material, err := root.NewTrustedRootFromJSON(text)
	switch {
	case err != nil:
		return nil, shortError{err}
	case len(material.FulcioCertificateAuthorities()) == 0:
		return nil, errors.New("the file has no certificate authority")
	case len(material.TimestampingAuthorities())+len(material.RekorLogs()) == 0:
		return nil, errors.New(
			"the file has neither a timestamp authority nor a log, so nothing can prove when something was signed")
	}
	return &Root{material}, nil
}

// Certified returns nil if an authority of this root issued the certificate. It does not check who used the
// certificate, or when.
func (r *Root) Certified(leaf *x509.Certificate) error {
	if _, err := chains(r.material, leaf); err != nil {
		return fault.Wrap(fault.Unverified, err, hintFor(err))
	}
	return nil
}

func chains(r root.TrustedMaterial, leaf *x509.Certificate) ([][]*x509.Certificate, error) {
	all, err := verify.VerifyLeafCertificate(leaf.NotBefore, leaf, r)
	if err != nil {
		return nil, fmt.Errorf("%w: the certificate was issued by %.200q", ErrOtherRoot, leaf.Issuer.String())
	}
	return all, nil
}

// Identity is a name in a certificate, and the issuer that confirmed it.
type Identity struct {
	// Subject is the certificate's subject alternative name: a URL or a mail address.
	Subject string
	// Pattern is a regular expression that must match the whole name. Exactly one of Subject and Pattern is set.
	Pattern string
	// Issuer is the URL of the OpenID Connect issuer.
	Issuer string
}

func (i Identity) String() string {
	if i.Pattern != "" {
		return fmt.Sprintf("/%s/ (%s)", i.Pattern, i.Issuer)
	}
	return fmt.Sprintf("%s (%s)", i.Subject, i.Issuer)
}

func (i Identity) matcher() (verify.CertificateIdentity, error) {
	none := verify.CertificateIdentity{}
	if (i.Subject == "") == (i.Pattern == "") || i.Issuer == "" {
		return none, errors.New("want an issuer, and either a subject or a pattern")
	}
	whole := ""
	if i.Pattern != "" {
		// Compile the pattern without the brackets first. An extra bracket in it could close the group, and the pattern would
		// then match a part of a name.
		if _, err := regexp.Compile(i.Pattern); err != nil {
			return none, err
		}
		whole = `\A(?:` + i.Pattern + `)\z`
	}
	return verify.NewShortCertificateIdentity(i.Issuer, "", i.Subject, whole)
}

// certificates is the part of a [Verifier] that checks signatures by certificates.
type certificates struct {
	root       root.TrustedMaterial
	identities string // the trusted certificate identities, for messages
	verifier   *verify.Verifier
	policy     verify.PolicyBuilder
	logged     bool // a certificate transparency log must have the certificates
}

func newCertificates(p Policy) (*certificates, error) {
	c := &certificates{root: p.Root.material}
	// Require a timestamp, and a proof from each kind of log that the root has. Otherwise somebody could sign in a
	// publisher's name unnoticed.
	demanded := []verify.VerifierOption{verify.WithObserverTimestamps(1)}
	if len(c.root.RekorLogs()) > 0 {
		demanded = append(demanded, verify.WithTransparencyLog(1))
	}
	if c.logged = len(c.root.CTLogs()) > 0; c.logged {
		demanded = append(demanded, verify.WithSignedCertificateTimestamps(1))
	}
	var names []string
	var whom []verify.PolicyOption
	for _, i := range p.Identities {
		m, err := i.matcher()
		if err != nil {
			return nil, fault.Wrap(fault.Usage, fmt.Errorf("check the certificate identity %s: %w", i, err),
				"give the subject and the issuer of the publisher's certificates")
		}
		names, whom = append(names, i.String()), append(whom, verify.WithCertificateIdentity(m))
	}
	c.identities, c.policy = strings.Join(names, ", "), verify.NewPolicy(verify.WithoutArtifactUnsafe(), whom...)
	var err error
	c.verifier, err = verify.NewVerifier(c.root, demanded...)
	return c, err
}

func (c *certificates) statement(b *bundle.Bundle, leaf *x509.Certificate) (*Statement, error) {
	result, err := c.verifier.Verify(b, c.policy)
	if err != nil {
		return nil, c.explain(b, leaf, err)
	}
	return readStatement(Statement{Identity: nameOf(*result.Signature.Certificate).String(),
		signer: nameOf(*result.Signature.Certificate)}, result)
}

func nameOf(s certificate.Summary) Identity {
	return Identity{Subject: s.SubjectAlternativeName, Issuer: s.Issuer}
}

// explain finds the reason why the library refused a bundle. Most errors of the library have no type, so explain checks
// the bundle again, step by step. It always returns an error, so it cannot accept a bundle.
func (c *certificates) explain(b *bundle.Bundle, leaf *x509.Certificate, cause error) error {
	if other := new(verify.ErrNoMatchingCertificateIdentity); errors.As(cause, &other) {
		who, err := certificate.SummarizeCertificate(leaf)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrMalformed, shortError{err})
		}
		return fmt.Errorf("%w: the signer is %.300q; trusted signers are %s", ErrUnknownIdentity, nameOf(who).String(),
			c.identities)
	}
	issued, err := chains(c.root, leaf)
	if err != nil {
		return err
	}
	if c.logged {
		if err := verify.VerifySignedCertificateTimestamp(issued, 1, c.root); err != nil {
			return fmt.Errorf("%w: no trusted certificate log has the certificate: %w", ErrOtherRoot, shortError{err})
		}
	}
	times, err := c.verifier.VerifyTransparencyLogInclusion(b)
	if err == nil {
		times, err = c.verifier.VerifyObserverTimestamps(b, times)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoTime, shortError{err})
	}
	for _, t := range times {
		if at := t.Timestamp; at.Before(leaf.NotBefore) || at.After(leaf.NotAfter) {
			return fmt.Errorf("%w: the certificate was valid from %s to %s, but the signature was made at %s", ErrNoTime,
				leaf.NotBefore.UTC(), leaf.NotAfter.UTC(), at.UTC())
		}
	}
	return fmt.Errorf("%w (signed with a certificate of %.200q)", ErrChanged, leaf.Issuer.String())
}
