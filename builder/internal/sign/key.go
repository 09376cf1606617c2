// Package sign has all code that uses private keys. It loads a signing key from a file or a KMS, or makes short-lived
// keys and gets certificates for them. It makes the statements about artifacts and releases, and signs each as a
// Sigstore bundle. The package does not publish, does not verify for other packages, and never exports a private key.
package sign

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/sigstore/sigstore/pkg/signature/options"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/trust"
)

// Signer signs statements, either with one lasting key or keyless. A lasting key is in a file or a KMS; its kind must
// be one that [trust.PublicKey] supports. Keyless signing uses short-lived keys, each with a certificate for the person
// or service that signs.
type Signer struct {
	sv      signature.Signer
	pub     crypto.PublicKey
	details signature.AlgorithmDetails
	key     trust.PublicKey

	keyless *keyless // set for keyless signing only, and then all fields above are empty
}

const maxKeyFile = 64 << 10

// Option changes how a key is loaded.
type Option func(*loading)

type loading struct {
	password func() ([]byte, error)
	root     *trust.Root
	token    func() ([]byte, error)
}

// WithPassword sets the function that returns the password of an encrypted key file, such as cosign writes. Without
// this option, encrypted keys are refused.
func WithPassword(f func() ([]byte, error)) Option {
	return func(l *loading) { l.password = f }
}

func newLoading(opts []Option) loading {
	l := loading{password: func() ([]byte, error) {
		return nil, errors.New("the key is encrypted with a password")
	}}
	for _, o := range opts {
		o(&l)
	}
	return l
}

// LoadSigner opens a key: the path of a PEM file, or a KMS URI such as gcpkms://projects/... The KMS provider is linked
// in, or is the plugin program sigstore-kms-<scheme> on PATH. For keyless signing, the reference is [PrefixKeyless] and
// the path of a signing configuration.
func LoadSigner(ctx context.Context, ref string, opts ...Option) (*Signer, error) {
	var s *Signer
	var err error
	if path, ok := strings.CutPrefix(ref, PrefixKeyless); ok {
		s, err = fromIdentity(ctx, path, newLoading(opts))
	} else if strings.Contains(ref, "://") {
		s, err = fromKMS(ctx, ref)
	} else {
		s, err = fromFile(ref, newLoading(opts))
	}
	if err != nil {
		return nil, fmt.Errorf("load signing key %s: %w", ref, err)
	}
	return s, nil
}

func privateFile(path string, l loading) (crypto.Signer, error) {
	text, err := readFile(path, maxKeyFile, "make a key with: builder keygen "+path)
	if err != nil {
		return nil, err
	}
	private, err := cryptoutils.UnmarshalPEMToPrivateKey(text, func(bool) ([]byte, error) { return l.password() })
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err, usableKey(path, text))
	}
	key, ok := private.(crypto.Signer)
	if !ok {
		return nil, fault.Errorf(fault.Usage, "a key of type %T cannot sign", private)
	}
	return key, nil
}

// usableKey returns a hint that says how to get a key that privateFile can read.
func usableKey(path string, text []byte) string {
	block, _ := pem.Decode(text)
	switch {
	case block == nil:
	case strings.Contains(block.Type, "SIGSTORE") || strings.Contains(block.Type, "COSIGN"):
		return "make a key without a password, because openssl cannot decrypt cosign's keys: builder keygen FILE; " +
			"nodes must trust FILE.pub too"
	case block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "": // PKCS #8, and the older form
		return "give the decrypted key, or a key in a KMS; to decrypt it: openssl pkey -in " + path + " -out DECRYPTED"
	}
	return "give a PEM file of type PRIVATE KEY, as \"builder keygen\" writes it"
}

func fromFile(path string, l loading) (*Signer, error) {
	private, err := privateFile(path, l)
	if err != nil {
		return nil, err
	}
	// NewPublicKey comes before LoadDefaultSigner, because its error lists the supported kinds of keys.
	if _, err := trust.NewPublicKey(private.Public()); err != nil {
		return nil, err
	}
	sv, err := signature.LoadDefaultSigner(private)
	if err != nil {
		return nil, err
	}
	return newSigner(sv, private.Public())
}

func newSigner(sv signature.Signer, pub crypto.PublicKey) (*Signer, error) {
	key, err := trust.NewPublicKey(pub)
	if err != nil {
		return nil, err
	}
	details, err := signature.GetDefaultAlgorithmDetails(pub)
	if err != nil {
		return nil, err
	}
	return &Signer{sv: sv, pub: pub, details: details, key: key}, nil
}

// PublicKey returns the public key of the signer. It is the zero value for a keyless signer.
func (s *Signer) PublicKey() trust.PublicKey { return s.key }

// Policy returns a policy that trusts only this signer: its key, or the name in its certificates.
func (s *Signer) Policy() trust.Policy {
	if s.keyless != nil {
		return s.keyless.policy
	}
	return trust.Policy{Keys: []trust.PublicKey{s.key}}
}

// String returns the ID of the key, or the name in the certificates of a keyless signer.
func (s *Signer) String() string {
	if s.keyless != nil {
		return s.keyless.policy.Identities[0].String()
	}
	return "key " + s.key.ID()
}

// Verifier returns a verifier that trusts this signer only, as [Signer.Policy] says.
func (s *Signer) Verifier() (*trust.Verifier, error) { return trust.NewVerifier(s.Policy()) }

// PublicPEM returns the public key in PEM, as in a node's configuration.
func (s *Signer) PublicPEM() ([]byte, error) { return cryptoutils.MarshalPublicKeyToPEM(s.pub) }

func (s *Signer) sign(ctx context.Context, data []byte) ([]byte, error) {
	return s.sv.SignMessage(bytes.NewReader(data), options.WithContext(ctx))
}

// GenerateKey makes an ECDSA P-256 key. It writes the private key to the path, readable by the owner only, and the
// public key to path.pub. It never overwrites a file.
func GenerateKey(path string) error {
	err := generateKey(path)
	if fault.NoSpace(err) {
		return fault.Disk(fmt.Errorf("generate key: %w", err), "free space on the disk of "+filepath.Dir(path))
	}
	if err != nil {
		hint := ""
		if errors.Is(err, os.ErrExist) {
			hint = "use another name for the new key: nodes that trust the old key would not trust what you publish " +
				"with the new one"
		}
		return fault.Wrap(fault.Usage, fmt.Errorf("generate key: %w", err), hint)
	}
	return nil
}

func generateKey(path string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	public, err := cryptoutils.MarshalPublicKeyToPEM(key.Public())
	if err != nil {
		return err
	}
	// Write the public key first. If the program is killed in between, no private key is left without its public key.
	if err := writeNew(path+".pub", public, 0o644); err != nil {
		return err
	}
	if err := writeNew(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600); err != nil {
		return errors.Join(err, os.Remove(path+".pub"))
	}
	return nil
}

func writeNew(path string, data []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}
