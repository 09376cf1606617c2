package modsign

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/smallstep/pkcs7"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
)

// Faults of a module's signature, each with the errno and message of a kernel with module.sig_enforce=1. The errors of
// this package wrap them.
var (
	// ErrUnsigned: EKEYREJECTED, "Loading of unsigned module is rejected".
	ErrUnsigned = errors.New("the module is not signed")
	// ErrMalformed: EBADMSG or EINVAL.
	ErrMalformed = errors.New("malformed module signature")
	// ErrUnknownKey: EKEYREJECTED, "Loading of module with unavailable key is rejected".
	ErrUnknownKey = errors.New("the module is signed with a key that is not trusted")
	// ErrChanged: EKEYREJECTED without a message.
	ErrChanged = errors.New("the module signature is not valid: the module or the signature changed after signing")
)

// Signature describes a valid signature.
type Signature struct {
	// Signer is the certificate of the key that made the signature.
	Signer *x509.Certificate
	// Hash is the object identifier of the hash algorithm.
	Hash asn1.ObjectIdentifier
}

// Split separates a module from its signature. For an unsigned module, the returned signature is nil. Split checks the
// trailer of a signed module by the kernel's rules (kernel/module_signature.c, mod_check_sig).
func Split(module []byte) (body, signature []byte, err error) {
	rest, ok := bytes.CutSuffix(module, []byte(modinfo.SignatureMagic))
	if !ok {
		return module, nil, nil
	}
	bad := func(what string) ([]byte, []byte, error) {
		return nil, nil, fault.Errorf(fault.CheckFailed, "%w: the trailer %s", ErrMalformed, what)
	}
	if len(rest) < trailerSize {
		return bad("is cut off")
	}
	info := rest[len(rest)-trailerSize:]
	rest = rest[:len(rest)-trailerSize]
	length := binary.BigEndian.Uint32(info[lengthAt:])
	want := make([]byte, lengthAt)
	want[kindAt] = kindPKCS7
	switch {
	case info[kindAt] != kindPKCS7:
		return bad("says that the signature is not PKCS #7")
	case !bytes.Equal(info[:lengthAt], want):
		return bad("has a value in a field that must be zero")
	case length == 0 || length > maxSignature || int64(length) >= int64(len(rest)):
		return bad(fmt.Sprintf("says that the signature has %d bytes; the file has %d bytes, and the limit is %d bytes",
			length, len(module), maxSignature))
	}
	at := len(rest) - int(length)
	return rest[:at], rest[at:], nil
}

// Verify checks by the kernel's rules that a module has a valid signature. The signer's certificate must be trusted, or
// certified by a trusted certificate. Like the kernel, Verify ignores validity periods, because the kernel has no clock
// that it trusts.
func Verify(module []byte, trusted []*x509.Certificate) (*Signature, error) {
	body, signature, err := Split(module)
	if err != nil {
		return nil, err
	}
	if signature == nil {
		return nil, fault.Wrap(fault.CheckFailed, ErrUnsigned, "sign the module: build with --module-key and --module-cert")
	}
	return verify(body, signature, trusted)
}

// VerifyFile is [Verify] for a file.
func VerifyFile(path string, trusted []*x509.Certificate) (*Signature, error) {
	module, err := readModule(path)
	if err == nil {
		var s *Signature
		if s, err = Verify(module, trusted); err == nil {
			return s, nil
		}
	}
	return nil, fmt.Errorf("verify module %s: %w", path, err)
}

// verify checks a detached signature (crypto/asymmetric_keys/pkcs7_*.c in the kernel).
func verify(body, signature []byte, trusted []*x509.Certificate) (*Signature, error) {
	s, err := func() (*Signature, error) {
		p7, err := parse(signature)
		if err != nil {
			return nil, err
		}
		reasons := []error{}
		for _, signer := range p7.Signers {
			cert := trustedSigner(signer.IssuerAndSerialNumber.IssuerName.FullBytes,
				signer.IssuerAndSerialNumber.SerialNumber.String(), p7.Certificates, trusted)
			if cert == nil {
				reasons = append(reasons,
					fmt.Errorf("%w: no trusted certificate has the serial number %.80s", ErrUnknownKey,
						signer.IssuerAndSerialNumber.SerialNumber))
				continue
			}
			one := *p7
			one.Content, one.Certificates, one.Signers = body, []*x509.Certificate{cert}, p7.Signers[:0:0]
			one.Signers = append(one.Signers, signer)
			if err := one.Verify(); err != nil {
				reasons = append(reasons, fmt.Errorf("%w: %.200q", ErrChanged, err.Error()))
				continue
			}
			return &Signature{Signer: cert, Hash: signer.DigestAlgorithm.Algorithm}, nil
		}
		return nil, reasons[0]
	}()
	if err != nil {
		return nil, fault.Wrap(fault.CheckFailed, err,
			"sign the module with a key whose certificate is built into the kernel: --module-key and --module-cert")
	}
	return s, nil
}

// Limits, because each part of a signature costs a verification: maxSigners signers, maxSent certificates in a
// signature or an archive, and maxChain certificates up to a trusted one. sign-file writes one signer and no
// certificates.
const (
	maxSigners = 16
	maxSent    = 16
	maxChain   = 8
)

// parse parses a signature. It refuses a signature that the kernel would not accept as a module's.
func parse(signature []byte) (p7 *pkcs7.PKCS7, err error) {
	if len(signature) > maxSignature {
		return nil, fmt.Errorf("%w: the signature has %d bytes; want at most %d bytes", ErrMalformed, len(signature),
			maxSignature)
	}
	// The library also accepts BER, and does not check every field. So first check that the signature is DER with the
	// structure below, and that no data follows it.
	var outline struct {
		Type    asn1.ObjectIdentifier
		Content struct {
			Version int
			Digests asn1.RawValue
			Inner   struct {
				Type    asn1.ObjectIdentifier
				Content asn1.RawValue `asn1:"explicit,optional,tag:0"`
			}
			Certificates asn1.RawValue   `asn1:"optional,tag:0"`
			CRLs         asn1.RawValue   `asn1:"optional,tag:1"`
			Signers      []asn1.RawValue `asn1:"set"`
		} `asn1:"explicit,tag:0"`
	}
	rest, err := asn1.Unmarshal(signature, &outline)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: parse the signature: %.200q", ErrMalformed, err.Error())
	case len(rest) > 0:
		return nil, fmt.Errorf("%w: there is data after the signature's end", ErrMalformed)
	case !outline.Type.Equal(pkcs7.OIDSignedData) || !outline.Content.Inner.Type.Equal(pkcs7.OIDData):
		return nil, fmt.Errorf("%w: the signature does not contain signed data", ErrMalformed)
	case len(outline.Content.Inner.Content.FullBytes) > 0:
		return nil, fmt.Errorf("%w: the signature contains the signed content; want a detached signature", ErrMalformed)
	}
	if p7, err = pkcs7.Parse(signature); err != nil {
		return nil, fmt.Errorf("%w: parse the signature: %.200q", ErrMalformed, err.Error())
	}
	if n := len(p7.Signers); n == 0 || n > maxSigners || n != len(outline.Content.Signers) {
		return nil, fmt.Errorf(
			"%w: the signature has %d signers, of which %d can be parsed; want 1 to %d signers, all of which can be parsed",
			ErrMalformed, len(outline.Content.Signers), n, maxSigners)
	}
	if n := len(p7.Certificates); n > maxSent {
		return nil, fmt.Errorf("%w: the signature has %d certificates; want at most %d certificates", ErrMalformed, n,
			maxSent)
	}
	for _, s := range p7.Signers {
		switch {
		case len(s.AuthenticatedAttributes) > 0: // pkcs7_verify.c: "Invalid module sig (authattrs)"
			return nil, fmt.Errorf("%w: the signature has signed attributes, which the kernel refuses", ErrMalformed)
		case s.IssuerAndSerialNumber.SerialNumber == nil:
			return nil, fmt.Errorf("%w: a signer has no serial number", ErrMalformed)
		case !strings.HasPrefix(s.DigestAlgorithm.Algorithm.String(), sha2):
			return nil, fmt.Errorf("%w: the signature's digest algorithm is %s; want one of the SHA-2 family", ErrMalformed,
				s.DigestAlgorithm.Algorithm)
		}
	}
	return p7, nil
}

// sha2 is the prefix of the object identifiers of the SHA-2 family.
const sha2 = "2.16.840.1.101.3.4.2."

// trustedSigner returns the certificate of the signer with this issuer and serial number, or nil. The certificate is
// trusted, or was sent with the signature and is certified by a trusted certificate.
func trustedSigner(issuer []byte, serial string, sent, trusted []*x509.Certificate) *x509.Certificate {
	is := func(c *x509.Certificate) bool {
		return bytes.Equal(c.RawIssuer, issuer) && c.SerialNumber.String() == serial
	}
	for _, c := range trusted {
		if is(c) {
			return c
		}
	}
	for _, c := range sent {
		if is(c) && isCertified(c, sent, trusted) {
			return c
		}
	}
	return nil
}

// isCertified reports whether a trusted certificate has certified c, directly or through the certificates in sent.
func isCertified(c *x509.Certificate, sent, trusted []*x509.Certificate) bool {
	certified := func(by *x509.Certificate) bool {
		return bytes.Equal(by.RawSubject, c.RawIssuer) &&
			by.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil
	}
	for range maxChain {
		for _, t := range trusted {
			if certified(t) {
				return true
			}
		}
		var next *x509.Certificate
		for _, s := range sent {
			if s != c && certified(s) {
				next = s
				break
			}
		}
		if next == nil {
			return false
		}
		c = next
	}
	return false
}
