package sign

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"strings"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/sigstore/sigstore/pkg/signature/kms"
	"github.com/sigstore/sigstore/pkg/signature/options"

	// These key managers are linked in. Others, such as PKCS #11 tokens, need a plugin program.
	_ "github.com/sigstore/sigstore/pkg/signature/kms/gcp"
	_ "github.com/sigstore/sigstore/pkg/signature/kms/hashivault"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/trust"
)

// hintRefs shows the format of a key's name for each key manager.
const hintRefs = "give the key in one of three forms: " +
	"gcpkms://projects/P/locations/L/keyRings/R/cryptoKeys/K/cryptoKeyVersions/V; " +
	"hashivault://KEY, with VAULT_ADDR and VAULT_TOKEN in the environment; " +
	"or NAME://..., with the plugin sigstore-kms-NAME on PATH"

const hintGoogle = "give Google credentials in one of three ways: a service account of the machine, a key file " +
	"whose path is in GOOGLE_APPLICATION_CREDENTIALS, or a login with: gcloud auth application-default login"

func openKMS(ctx context.Context, ref string, hash crypto.Hash) (kms.SignerVerifier, crypto.PublicKey, error) {
	sv, err := kms.Get(ctx, ref, hash)
	if err != nil {
		var missing *kms.ProviderNotFoundError
		if errors.As(err, &missing) {
			scheme, _, _ := strings.Cut(ref, "://")
			return nil, nil, fault.Wrap(fault.Usage, err, "put the plugin sigstore-kms-"+scheme+" on PATH, or use a key file")
		}
		return nil, nil, explain(err)
	}
	pub, err := sv.PublicKey(options.WithContext(ctx))
	if err != nil {
		return nil, nil, explain(err)
	}
	return sv, pub, nil
}

// explain adds a kind and a hint to an error of a KMS: [fault.Usage] for wrong arguments or credentials,
// [fault.Transient] otherwise. It compares texts, because the libraries have no error types.
func explain(err error) error {
	for _, known := range []struct{ text, hint string }{
		{"kms specification", hintRefs},
		{"is not set", hintRefs},
		{"no Vault token", hintRefs},
		{".vault-token", hintRefs},
		{"credentials:", hintGoogle},
		{"new gcp kms client: open ", hintGoogle},
		{"permission denied", "check that these credentials may use the key and read its public key"},
		{"PermissionDenied", "grant the builder's account the role roles/cloudkms.signerVerifier on the key"},
	} {
		if strings.Contains(err.Error(), known.text) {
			return fault.Wrap(fault.Usage, err, known.hint)
		}
	}
	return fault.Wrap(fault.Transient, err, "check that the KMS can be reached")
}

func fromKMS(ctx context.Context, ref string) (*Signer, error) {
	sv, pub, err := openKMS(ctx, ref, crypto.SHA256)
	if err != nil {
		return nil, err
	}
	if _, err := trust.NewPublicKey(pub); err != nil {
		return nil, err
	}
	details, err := signature.GetDefaultAlgorithmDetails(pub)
	if err != nil {
		return nil, err
	}
	if hash := details.GetHashType(); hash != crypto.SHA256 {
		if sv, pub, err = openKMS(ctx, ref, hash); err != nil {
			return nil, err
		}
	}
	return newSigner(sv, pub)
}

// OpenKey opens a key that does not sign statements, but for example kernel modules. ref is the path of a PEM file or a
// KMS URI, as for [LoadSigner]. Any kind of key is accepted. The key works until ctx ends.
func OpenKey(ctx context.Context, ref string, opts ...Option) (crypto.Signer, error) {
	key, err := func() (crypto.Signer, error) {
		if !strings.Contains(ref, "://") {
			return privateFile(ref, newLoading(opts))
		}
		sv, _, err := openKMS(ctx, ref, crypto.SHA256)
		if err != nil {
			return nil, err
		}
		// The callback for errors can be empty: after an error, key.Public returns nil and key.Sign returns the error.
		key, _, err := sv.CryptoSigner(ctx, func(error) {})
		if err == nil && key.Public() == nil {
			err = errors.New("the KMS returned no public key")
		}
		if err != nil {
			return nil, explain(err)
		}
		return key, nil
	}()
	if err != nil {
		return nil, fmt.Errorf("open the key %s: %w", ref, err)
	}
	return key, nil
}
