package trust

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/prebake/prebake/pkg/fault"
)

// PublicKey is a trusted key: ECDSA on P-256, P-384 or P-521; RSA (PKCS #1 v1.5) of 2048, 3072 or 4096 bits; or
// Ed25519. A signature must use the hash that Sigstore's algorithm registry has for that kind of key.
type PublicKey struct {
	key crypto.PublicKey
	sum [sha256.Size]byte // of the DER form (SubjectPublicKeyInfo)
}

const (
	maxKeys    = 64
	maxKeyFile = 64 << 10
)

// NewPublicKey checks a key's algorithm and length.
func NewPublicKey(pub crypto.PublicKey) (PublicKey, error) {
	if _, err := signature.GetDefaultPublicKeyDetails(pub); err != nil {
		return PublicKey{}, fault.New(fault.Usage,
			fmt.Sprintf("read public key: a key of type %T with this curve or length is not supported", pub),
			"use ECDSA P-256, P-384 or P-521, RSA of 2048, 3072 or 4096 bits, or Ed25519; "+
				"to make such a key: builder keygen FILE")
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return PublicKey{}, fault.Errorf(fault.Usage, "read public key: %w", err)
	}
	return PublicKey{key: pub, sum: sha256.Sum256(der)}, nil
}

// ParsePublicKeys parses one or more PEM blocks of type PUBLIC KEY. Only white space may be outside the blocks.
func ParsePublicKeys(text []byte) ([]PublicKey, error) {
	keys, err := parsePublicKeys(text)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("read public keys: %w", err),
			"give a file with PEM blocks of type PUBLIC KEY, as builder and cosign write them")
	}
	return keys, nil
}

func parsePublicKeys(text []byte) ([]PublicKey, error) {
	if len(text) > maxKeyFile {
		return nil, fmt.Errorf("the file has %d bytes; want at most %d bytes", len(text), maxKeyFile)
	}
	var keys []PublicKey
	for rest := bytes.TrimSpace(text); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		if !bytes.HasPrefix(rest, []byte("-----BEGIN ")) {
			return nil, errors.New("the file has text outside of PEM blocks")
		}
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, errors.New("the file has a PEM block that cannot be decoded")
		}
		if block.Type != "PUBLIC KEY" {
			return nil, fmt.Errorf("PEM block of type %.40q; want PUBLIC KEY", block.Type)
		}
		pub, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, err
		}
		key, err := NewPublicKey(pub)
		if err != nil {
			return nil, err
		}
		if keys = append(keys, key); len(keys) > maxKeys {
			return nil, fmt.Errorf("the file has more than %d keys", maxKeys)
		}
	}
	if len(keys) == 0 {
		return nil, errors.New("the file has no key")
	}
	return keys, nil
}

// ID returns the first 16 hex digits of the SHA-256 of the key's DER form. To print the whole SHA-256, run: openssl
// pkey -pubin -outform DER | sha256sum.
func (k PublicKey) ID() string { return hex.EncodeToString(k.sum[:8]) }

// Hint returns the SHA-256 of the key's DER form in base64. A Sigstore bundle refers to its key by this value.
func (k PublicKey) Hint() string { return base64.StdEncoding.EncodeToString(k.sum[:]) }

func (k PublicKey) verifier() (signature.Verifier, error) {
	return signature.LoadDefaultVerifier(k.key)
}

// hintID returns the [PublicKey.ID] for a bundle's hint. For a malformed hint, it returns the beginning in quotes.
func hintID(hint string) string {
	if sum, err := base64.StdEncoding.DecodeString(hint); err == nil && len(sum) == sha256.Size {
		return hex.EncodeToString(sum[:8])
	}
	return fmt.Sprintf("%.40q", hint)
}

func ids(keys []PublicKey) string {
	var all []string
	for _, k := range keys {
		all = append(all, k.ID())
	}
	return strings.Join(all, ", ")
}
