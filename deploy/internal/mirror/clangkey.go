package mirror

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/prebake/prebake/pkg/fault"
)

// signingPair is a private key and its certificate. Each cache folder has its own pair. The clang-built kernel trusts
// the certificate for modules. The private key is published too, so that users can try module signatures on that
// kernel. Nothing else may ever trust the certificate.
type signingPair struct {
	key, cert []byte // in PEM
}

// signingFile contains the private key and the certificate. They are in one file, so that a killed run never leaves a
// key without its certificate.
const signingFile = "test-module-signing.pem"

// signingKey returns the pair of this cache folder. If the folder has no pair, signingKey makes one.
func (m *maker) signingKey() (signingPair, error) {
	path := filepath.Join(m.Cache, signingFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if text, err = newSigningPair(); err != nil {
			return signingPair{}, fmt.Errorf("make the key for module signatures: %w", err)
		}
		err = writeAtomic(path, func(w io.Writer) error {
			_, err := w.Write(text)
			return err
		})
	}
	if err != nil {
		return signingPair{}, err
	}
	return parseSigningPair(text, path)
}

func newSigningPair() ([]byte, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	public := x509.MarshalPKCS1PublicKey(&key.PublicKey)
	id := sha256.Sum256(public)
	// The kernel does not check the dates, only the key usage.
	cert, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		Subject:   pkix.Name{Organization: []string{"Prebake"}, CommonName: "Prebake test module signing"},
		NotBefore: epoch, NotAfter: epoch.AddDate(100, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		SubjectKeyId: id[:20], SignatureAlgorithm: x509.SHA256WithRSA,
	}, &x509.Certificate{Subject: pkix.Name{Organization: []string{"Prebake"}, CommonName: "Prebake test module signing"},
		SubjectKeyId: id[:20]}, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})...), nil
}

func parseSigningPair(text []byte, path string) (signingPair, error) {
	bad := func(what string) (signingPair, error) {
		return signingPair{}, fault.New(fault.Checksum, fmt.Sprintf("read %s: %s", path, what),
			"remove the file, and run again: the next run makes a new pair")
	}
	key, rest := pem.Decode(text)
	if key == nil || key.Type != "PRIVATE KEY" {
		return bad("the file does not begin with a private key")
	}
	cert, rest := pem.Decode(rest)
	if cert == nil || cert.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return bad("want a private key and one certificate")
	}
	return signingPair{key: pem.EncodeToMemory(key), cert: pem.EncodeToMemory(cert)}, nil
}
