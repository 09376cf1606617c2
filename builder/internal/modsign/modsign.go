// Package modsign signs kernel modules like the kernel's program sign-file, and verifies such signatures by the
// kernel's rules. It also attaches Google's detached signatures to modules with exactly the signed bytes, and unpacks
// modules that Google compiled and signed.
//
// Equal inputs must give equal modules, so the package refuses keys whose signatures differ from run to run. It refuses
// a module that is signed already. It verifies every new signature before it writes the signed module. Private keys
// stay in package sign.
package modsign

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	ocidigest "github.com/opencontainers/go-digest"
	"github.com/smallstep/pkcs7"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
)

// Recipe is the version of the signatures that [Signer.Sign] makes, and part of the cache keys of signed modules. Raise
// it if Sign makes another signature from the same module, key and hash algorithm.
const Recipe = "modsign-1"

// Limits in bytes. The largest module of a driver has about 70 MB after it is stripped.
const (
	maxModule    = 512 << 20
	maxSignature = 1 << 20
	maxCertFile  = 1 << 20
)

// Signer signs modules with one RSA key, which may be in a file or a KMS.
type Signer struct {
	key      crypto.Signer
	cert     *x509.Certificate
	identity string
}

// Load opens an RSA key. keyRef is the path of a PEM file or a KMS URI, as for [sign.OpenKey]. Load also reads the
// key's certificate (PEM or DER), which the kernel must trust.
func Load(ctx context.Context, keyRef, certPath string) (*Signer, error) {
	s, err := load(ctx, keyRef, certPath)
	if err != nil {
		return nil, fmt.Errorf("load the module signing key: %w", err)
	}
	return s, nil
}

func load(ctx context.Context, keyRef, certPath string) (*Signer, error) {
	certs, err := ReadCertificates(certPath)
	if err != nil {
		return nil, err
	}
	if len(certs) != 1 {
		return nil, fault.New(fault.Usage, fmt.Sprintf("the file %s has %d certificates; want one", certPath, len(certs)),
			"give --module-cert a file that has only the certificate of the signing key")
	}
	key, err := sign.OpenKey(ctx, keyRef)
	if err != nil {
		return nil, err
	}
	cert := certs[0]
	pub, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		return nil, fault.New(fault.Usage,
			fmt.Sprintf("%s is a key of type %T; want an RSA key, whose signatures are the same each time",
				keyRef, key.Public()),
			"make an RSA key with: openssl req -x509 -newkey rsa:4096 -nodes -subj /CN=modules -days 36500 -keyout "+
				"modules.key -out modules.crt")
	}
	// rsa_check_key_length in the kernel's crypto/rsa.c refuses other lengths, except 512, 1024 and 1536 bits outside of
	// FIPS mode. Those are too short to be safe.
	if !slices.Contains([]int{2048, 3072, 4096}, pub.N.BitLen()) {
		return nil, fault.New(fault.Usage, fmt.Sprintf("%s is an RSA key of %d bits; want 2048, 3072 or 4096 bits", keyRef,
			pub.N.BitLen()),
			"use an RSA key of 2048, 3072 or 4096 bits: the kernel can verify its signatures")
	}
	if !pub.Equal(cert.PublicKey) {
		return nil, fault.New(fault.Usage, fmt.Sprintf("certificate %s does not belong to key %s", certPath, keyRef),
			"give the certificate of this key with --module-cert")
	}
	if cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return nil, fault.New(fault.Usage, fmt.Sprintf("certificate %s is not for signatures", certPath),
			"make a certificate with key usage digitalSignature")
	}
	return &Signer{key: key, cert: cert, identity: Fingerprint(cert)}, nil
}

// ReadCertificates reads a file with certificates in a format that [ParseCertificates] accepts.
func ReadCertificates(path string) ([]*x509.Certificate, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err, "give the file of the certificate with --module-cert")
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxCertFile+1))
	if err != nil {
		return nil, err
	}
	certs, err := ParseCertificates(text)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("read certificate %s: %w", path, err),
			"give an X.509 certificate in PEM or DER")
	}
	return certs, nil
}

// ParseCertificates parses certificates in PEM, or certificates in DER with nothing between them.
func ParseCertificates(text []byte) ([]*x509.Certificate, error) {
	if len(text) > maxCertFile {
		return nil, fmt.Errorf("the file has more than %d bytes", maxCertFile)
	}
	block, rest := pem.Decode(text)
	if block == nil {
		return x509.ParseCertificates(text)
	}
	var certs []*x509.Certificate
	for ; block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block of type %.40q; want CERTIFICATE", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	return certs, nil
}

// Fingerprint returns "sha256:" and the SHA-256 of the certificate's DER form, in hex.
func Fingerprint(cert *x509.Certificate) string {
	return ocidigest.FromBytes(cert.Raw).String()
}

// Identity returns the [Fingerprint] of the certificate. Module, hash algorithm, [Recipe] and Identity decide the bytes
// of a signature.
func (s *Signer) Identity() string { return s.identity }

// Certificate returns the certificate of the signer's key. The kernel needs it to verify the signatures.
func (s *Signer) Certificate() *x509.Certificate { return s.cert }

// Key returns a cache key for signatures by this signer with this hash algorithm.
func (s *Signer) Key(hash string) string { return Recipe + "-" + hash + "-" + s.identity }

// Sign signs a module and writes it to a new file. The hash is the kernel's CONFIG_MODULE_SIG_HASH (see [ReadConfig]).
func (s *Signer) Sign(ctx context.Context, src, dst, hash string) error {
	if err := s.signFile(ctx, src, dst, hash); err != nil {
		return fmt.Errorf("sign module %s: %w", src, err)
	}
	return nil
}

func (s *Signer) signFile(ctx context.Context, src, dst, hash string) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	digest, err := digestOf(hash)
	if err != nil {
		return err
	}
	module, err := readModule(src)
	if err != nil {
		return err
	}
	switch _, signature, err := Split(module); {
	case err != nil:
		return err
	case signature != nil:
		return fault.New(fault.CheckFailed, "the module is signed already",
			"sign the unsigned module that the compiler made")
	}
	signature, err := s.detachedSignature(module, digest)
	if err != nil {
		return err
	}
	if _, err := verify(module, signature, []*x509.Certificate{s.cert}); err != nil {
		// A KMS key for RSA-PSS, or for another hash, signs too, but the kernel cannot verify its signature.
		return fault.Wrap(fault.Usage, fmt.Errorf("verify the new signature: %w", err),
			"give --module-key a KMS key that signs by RSA PKCS#1 v1.5 with "+hash)
	}
	return writeNew(dst, module, signature, trailer(signature))
}

// digestOf returns the library's identifier of a hash algorithm.
func digestOf(hash string) (asn1.ObjectIdentifier, error) {
	switch hash {
	case "sha256":
		return pkcs7.OIDDigestAlgorithmSHA256, nil
	case "sha384":
		return pkcs7.OIDDigestAlgorithmSHA384, nil
	case "sha512":
		return pkcs7.OIDDigestAlgorithmSHA512, nil
	}
	return nil, fault.New(fault.Unsupported, fmt.Sprintf("the kernel wants module signatures with hash %.40q", hash),
		"build for this kernel without --module-key: Prebake signs modules only with sha256, sha384 or sha512")
}

// detachedSignature makes the CMS structure of scripts/sign-file, without content, certificates and signed attributes.
// The kernel refuses signed attributes in modules.
func (s *Signer) detachedSignature(module []byte, digest asn1.ObjectIdentifier) ([]byte, error) {
	sd, err := pkcs7.NewSignedData(module)
	if err != nil {
		return nil, err
	}
	sd.SetDigestAlgorithm(digest)
	// The kernel supports only the plain RSA algorithm here, for every hash.
	sd.SetEncryptionAlgorithm(pkcs7.OIDEncryptionAlgorithmRSA)
	if err := sd.SignWithoutAttr(s.cert, s.key, pkcs7.SignerInfoConfig{}); err != nil {
		return nil, fault.Wrap(fault.Transient, err, "check that this machine can reach the key of --module-key")
	}
	sd.Detach()
	// Finish would add the certificate, so this code wraps the structure itself.
	body := sd.GetSignedData()
	body.SignerInfos[0].DigestEncryptionAlgorithm.Parameters = asn1.NullRawValue
	inner, err := asn1.Marshal(*body)
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue
	}{pkcs7.OIDSignedData, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: inner}})
}

// The trailer, struct module_signature of include/linux/module_signature.h: its size, the offsets of two fields in
// bytes, and the type PKEY_ID_PKCS7. All other fields except the signature's length are zero.
const (
	trailerSize = 12
	kindAt      = 2
	kindPKCS7   = 2
	lengthAt    = 8
)

// trailer returns the bytes that follow a signature in a module.
func trailer(signature []byte) []byte {
	t := make([]byte, trailerSize, trailerSize+len(modinfo.SignatureMagic))
	t[kindAt] = kindPKCS7
	binary.BigEndian.PutUint32(t[lengthAt:], uint32(len(signature))) //nolint:gosec // bounded by maxSignature
	return append(t, modinfo.SignatureMagic...)
}

func readModule(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readBounded(f)
}

func readBounded(r io.Reader) ([]byte, error) {
	module, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, err
	}
	if len(module) > maxModule {
		return nil, fault.Errorf(fault.CheckFailed, "the module has more than %d bytes", maxModule)
	}
	return module, nil
}

// writeNew writes a module to a new file. After an error it leaves no incomplete file.
func writeNew(dst string, parts ...[]byte) error {
	f, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	for _, part := range parts {
		if err == nil {
			_, err = f.Write(part)
		}
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(dst))
	}
	return nil
}
