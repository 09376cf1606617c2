package cossrc

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"

	ocidigest "github.com/opencontainers/go-digest"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/target"
)

// fingerprintScheme is the first line of the text that combine hashes. Raise the number if the format of the text
// changes. Nodes then do not find the artifacts that were published before.
const fingerprintScheme = "prebake fingerprint 1\n"

// Fingerprint returns the ABI fingerprint of a header tree, a toolchain and toolchain_env, for modules without BTF. The
// toolchain's digest is made by [cas.DigestTree] from its unpacked content. See the package comment for the files that
// are left out.
func Fingerprint(headersDir, toolchainTreeDigest string, env map[string]string) (target.Fingerprint, error) {
	headers, err := digestHeaders(context.Background(), headersDir)
	if err != nil {
		return "", err
	}
	return combine(headers, toolchainTreeDigest, "", env), nil
}

func digestHeaders(ctx context.Context, dir string) (string, error) {
	digest, err := cas.DigestTree(ctx, dir, volatile)
	if err != nil {
		return "", fmt.Errorf("compute the digest of the headers %s: %w", dir, err)
	}
	return digest, nil
}

// volatile reports whether a file of a header tree differs between two compilations of the same kernel. The name is a
// slash path in the tree.
func volatile(name string) bool {
	return name == "include/generated/compile.h" || name == "include/generated/utsversion.h"
}

// combine computes the fingerprint from the digests of its parts. btf is "" for modules without BTF.
func combine(headers, toolchain, btf string, env map[string]string) target.Fingerprint {
	h := sha256.New()
	fmt.Fprintf(h, "%sheaders %s\ntoolchain %s\n", fingerprintScheme, headers, toolchain)
	if btf != "" {
		fmt.Fprintf(h, "btf %s\n", btf)
	}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		fmt.Fprintf(h, "env %s=%q\n", name, env[name])
	}
	return target.Fingerprint(ocidigest.NewDigest(ocidigest.SHA256, h).String())
}
