// Command sigstore-kms-filekey is a minimal plugin for Sigstore's KMS protocol. The URI filekey:///PATH signs with a
// PEM key in a file. Tests build it.
package main

import (
	"context"
	"crypto"
	"errors"
	"os"
	"strings"

	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/sigstore/sigstore/pkg/signature/kms/cliplugin/common"
	"github.com/sigstore/sigstore/pkg/signature/kms/cliplugin/handler"
)

type holder struct{ signature.SignerVerifier }

func (holder) DefaultAlgorithm() string      { return "any" }
func (holder) SupportedAlgorithms() []string { return []string{"any"} }
func (holder) CreateKey(context.Context, string) (crypto.PublicKey, error) {
	return nil, errors.New("create a key: this plugin creates no keys")
}

func (holder) CryptoSigner(context.Context, func(error)) (crypto.Signer, crypto.SignerOpts, error) {
	return nil, nil, errors.New("get a signer: the protocol of plugins has no such call")
}

func open(args *common.PluginArgs) (holder, error) {
	text, err := os.ReadFile(strings.TrimPrefix(args.InitOptions.KeyResourceID, "filekey://"))
	if err != nil {
		return holder{}, err
	}
	key, err := cryptoutils.UnmarshalPEMToPrivateKey(text, nil)
	if err != nil {
		return holder{}, err
	}
	sv, err := signature.LoadSignerVerifier(key, args.InitOptions.HashFunc)
	return holder{sv}, err
}

func main() {
	args, err := handler.GetPluginArgs(os.Args)
	var h holder
	if err == nil {
		h, err = open(args)
	}
	if err != nil {
		_ = handler.WriteErrorResponse(os.Stdout, err)
		os.Exit(1)
	}
	if _, err := handler.Dispatch(os.Stdout, os.Stdin, args, h); err != nil {
		os.Exit(1)
	}
}
