package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/trust"
)

// envToken is the variable in which a CI system passes an OpenID Connect token to Sigstore's own tools.
const envToken = "SIGSTORE_ID_TOKEN"

func identityTokenFlag() ucli.Flag {
	f := cli.String("identity-token", "", "`FILE` with an OpenID Connect token for keyless signing")
	f.DefaultText = "the token in $" + envToken
	return f
}

func isKeyless(cmd *ucli.Command) bool {
	return strings.HasPrefix(cmd.String("key"), sign.PrefixKeyless)
}

// checkKey refuses a keyless --key without --trusted-root, and --identity-token with any other --key.
func checkKey(cmd *ucli.Command) error {
	if isKeyless(cmd) {
		return cli.About(requireFlags(cmd, "trusted-root"), "key")
	}
	return refuseFlags(cmd, "a key file or a KMS key", "identity-token")
}

// keyOptions returns the options for loading the key in --key.
func keyOptions(cmd *ucli.Command) ([]sign.Option, error) {
	if err := checkKey(cmd); err != nil || !isKeyless(cmd) {
		return nil, err
	}
	root, err := trust.ReadRoot(cmd.String("trusted-root"))
	if err != nil {
		return nil, err
	}
	file := cmd.String("identity-token")
	return []sign.Option{sign.WithIdentity(root, func() ([]byte, error) { return identityToken(file) })}, nil
}

// newVerifier returns a verifier that trusts the public keys and the keyless signer in the flags.
func newVerifier(cmd *ucli.Command) (*trust.Verifier, error) {
	var policy trust.Policy
	for _, file := range cmd.StringSlice("public-key") {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, fault.Wrap(fault.Usage, fmt.Errorf("read public key: %w", err),
				"give the file FILE.pub that \"builder keygen\" wrote")
		}
		keys, err := trust.ParsePublicKeys(text)
		if err != nil {
			return nil, err
		}
		policy.Keys = append(policy.Keys, keys...)
	}
	who := trust.Identity{Subject: cmd.String("certificate-identity"), Pattern: cmd.String("certificate-identity-regexp"),
		Issuer: cmd.String("certificate-oidc-issuer")}
	if who != (trust.Identity{}) {
		if err := requireFlags(cmd, "trusted-root"); err != nil {
			return nil, err
		}
		root, err := trust.ReadRoot(cmd.String("trusted-root"))
		if err != nil {
			return nil, err
		}
		policy.Root, policy.Identities = root, []trust.Identity{who}
	}
	if len(policy.Keys)+len(policy.Identities) == 0 {
		return nil, fault.New(fault.Usage, "no key is trusted for provenance",
			"for a key, add --public-key FILE; for a keyless signer, add --trusted-root FILE, --certificate-identity NAME "+
				"and --certificate-oidc-issuer URL")
	}
	return trust.NewVerifier(policy)
}

func identityToken(file string) ([]byte, error) {
	token, err := []byte(os.Getenv(envToken)), error(nil)
	if file != "" {
		token, err = os.ReadFile(file)
	}
	if token = bytes.TrimSpace(token); err == nil && len(token) == 0 {
		err = errors.New("the token is empty")
	}
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("read identity token: %w", err),
			"give the OpenID Connect token in a file, with --identity-token FILE, or in the variable "+envToken)
	}
	return token, nil
}
