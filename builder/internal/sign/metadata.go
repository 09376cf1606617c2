package sign

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"fmt"
	"strings"

	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/prebake/prebake/pkg/fault"
)

// Metadata loads a key for the metadata of a snapshot. It returns the public key and a signer, which is nil if the
// reference is a public key. The key must be ECDSA P-256, which all TUF clients and key managers support.
func Metadata(ctx context.Context, ref string, opts ...Option) (crypto.PublicKey, signature.Signer, error) {
	pub, by, err := metadata(ctx, ref, opts)
	if err == nil {
		if key, ok := pub.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
			err = fault.New(fault.Usage, "the key is not an ECDSA P-256 key", "make keys with: builder snapshot keys FOLDER")
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("load snapshot key %s: %w", ref, err)
	}
	return pub, by, nil
}

func metadata(ctx context.Context, ref string, opts []Option) (crypto.PublicKey, signature.Signer, error) {
	if strings.HasPrefix(ref, PrefixKeyless) {
		return nil, nil, fault.New(
			fault.Usage,
			"a snapshot cannot be signed keyless: a keyless signing key is valid for some minutes only",
			"give a key file or a KMS URI",
		)
	}
	if !strings.Contains(ref, "://") {
		text, err := readFile(ref, maxKeyFile, "make keys with: builder snapshot keys FOLDER")
		if err != nil {
			return nil, nil, err
		}
		if bytes.HasPrefix(bytes.TrimSpace(text), []byte("-----BEGIN PUBLIC KEY-----")) {
			pub, err := cryptoutils.UnmarshalPEMToPublicKey(text)
			return pub, nil, fault.Wrap(fault.Usage, err, "give a PEM file of type PUBLIC KEY, as \"builder keygen\" writes it")
		}
	}
	s, err := LoadSigner(ctx, ref, opts...)
	if err != nil {
		return nil, nil, err
	}
	return s.pub, s.sv, nil
}
