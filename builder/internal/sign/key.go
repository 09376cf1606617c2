// Package sign is the private-key side: it loads a signing key from a file or
// a KMS, makes the statements about an artifact, and signs them into Sigstore
// bundles. It refuses to publish, to verify for others, and to let a private
// key out.
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
	"io"
	"os"
	"strings"

	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/sigstore/sigstore/pkg/signature/kms"
	"github.com/sigstore/sigstore/pkg/signature/options"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/trust"
)

// Signer signs with one ECDSA P-256 key, wherever that is kept.
type Signer struct {
	sv  signature.Signer
	pub *ecdsa.PublicKey
	key trust.PublicKey
}

const maxKeyFile = 64 << 10

// Option changes how a key is loaded.
type Option func(*loading)

type loading struct {
	password func() ([]byte, error)
}

// WithPassword is asked for the password of an encrypted key file, such as
// cosign writes. Without it, encrypted keys are refused.
func WithPassword(f func() ([]byte, error)) Option {
	return func(l *loading) { l.password = f }
}

func newLoading(opts []Option) loading {
	l := loading{password: func() ([]byte, error) { return nil, errors.New("the key is encrypted, and there is no password") }}
	for _, o := range opts {
		o(&l)
	}
	return l
}

// LoadSigner opens a key: ref is the path of a PEM file, or a KMS URI such as
// gcpkms://projects/... A URI is served by a provider that is linked into the
// program, else by a plugin program sigstore-kms-<scheme> on PATH.
func LoadSigner(ctx context.Context, ref string, opts ...Option) (*Signer, error) {
	var s *Signer
	var err error
	if strings.Contains(ref, "://") {
		s, err = fromKMS(ctx, ref)
	} else {
		s, err = fromFile(ref, newLoading(opts))
	}
	if err != nil {
		return nil, fmt.Errorf("load signing key %s: %w", ref, err)
	}
	return s, nil
}

func openKMS(ctx context.Context, ref string) (kms.SignerVerifier, error) {
	sv, err := kms.Get(ctx, ref, crypto.SHA256)
	if err != nil {
		var missing *kms.ProviderNotFoundError
		if errors.As(err, &missing) {
			scheme, _, _ := strings.Cut(ref, "://")
			return nil, fault.Wrap(fault.Usage, err, "put the plugin sigstore-kms-"+scheme+" on PATH, or use a key file")
		}
		return nil, fault.Wrap(fault.Transient, err, "check that the KMS can be reached and that these credentials may use the key")
	}
	return sv, nil
}

func fromKMS(ctx context.Context, ref string) (*Signer, error) {
	sv, err := openKMS(ctx, ref)
	if err != nil {
		return nil, err
	}
	pub, err := sv.PublicKey(options.WithContext(ctx))
	if err != nil {
		return nil, fault.Wrap(fault.Transient, err, "check that these credentials may read the public key")
	}
	return newSigner(sv, pub)
}

func privateFile(path string, l loading) (crypto.Signer, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err, "make a key with: builder keygen "+path)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxKeyFile {
		return nil, fault.Errorf(fault.Usage, "more than %d bytes", maxKeyFile)
	}
	private, err := cryptoutils.UnmarshalPEMToPrivateKey(text, func(bool) ([]byte, error) { return l.password() })
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err, "give a PEM file of type PRIVATE KEY, as builder keygen writes it")
	}
	key, ok := private.(crypto.Signer)
	if !ok {
		return nil, fault.Errorf(fault.Usage, "a key of type %T cannot sign", private)
	}
	return key, nil
}

func fromFile(path string, l loading) (*Signer, error) {
	private, err := privateFile(path, l)
	if err != nil {
		return nil, err
	}
	key, ok := private.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fault.New(fault.Usage, "not an ECDSA P-256 key", "make one with: builder keygen FILE")
	}
	sv, err := signature.LoadECDSASigner(key, crypto.SHA256)
	if err != nil {
		return nil, err
	}
	return newSigner(sv, key.Public())
}

func newSigner(sv signature.Signer, pub crypto.PublicKey) (*Signer, error) {
	key, err := trust.NewPublicKey(pub)
	if err != nil {
		return nil, err
	}
	return &Signer{sv: sv, pub: pub.(*ecdsa.PublicKey), key: key}, nil
}

// PublicKey returns the public half, for verifying.
func (s *Signer) PublicKey() trust.PublicKey { return s.key }

// Verifier returns a verifier that trusts this key only.
func (s *Signer) Verifier() (*trust.Verifier, error) {
	return trust.NewVerifier(trust.Policy{Keys: []trust.PublicKey{s.key}})
}

// PublicPEM returns the public half in the form that nodes are configured with.
func (s *Signer) PublicPEM() ([]byte, error) { return cryptoutils.MarshalPublicKeyToPEM(s.pub) }

func (s *Signer) sign(ctx context.Context, data []byte) ([]byte, error) {
	return s.sv.SignMessage(bytes.NewReader(data), options.WithContext(ctx))
}

// GenerateKey makes an ECDSA P-256 key and writes it to path, readable by its
// owner only, and the public half to path.pub. It never overwrites a file.
func GenerateKey(path string) error {
	if err := generateKey(path); err != nil {
		hint := ""
		if errors.Is(err, os.ErrExist) {
			hint = "use another name: whoever trusts the old key would no longer trust what you publish"
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
	// The public half first: a private key alone would look complete.
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

// OpenKey opens a key of any kind, by file or URI as in [LoadSigner], for
// signatures that are no statements, such as those of kernel modules. It works
// for as long as ctx does.
func OpenKey(ctx context.Context, ref string, opts ...Option) (crypto.Signer, error) {
	key, err := func() (crypto.Signer, error) {
		if !strings.Contains(ref, "://") {
			return privateFile(ref, newLoading(opts))
		}
		sv, err := openKMS(ctx, ref)
		if err != nil {
			return nil, err
		}
		key, _, err := sv.CryptoSigner(ctx, func(error) {}) // Public returns nil then, and Sign its error
		if err == nil && key.Public() == nil {
			err = errors.New("no public key")
		}
		if err != nil {
			return nil, fault.Wrap(fault.Transient, err, "check that these credentials may read the public key")
		}
		return key, nil
	}()
	if err != nil {
		return nil, fmt.Errorf("open key %s: %w", ref, err)
	}
	return key, nil
}
