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

// fingerprintScheme is the first line of the text that combine hashes. If the form of that text changes, raise the
// number. After such a change, nodes do not find the artifacts that were published before, because nodes look for
// artifacts by fingerprint.
const fingerprintScheme = "prebake fingerprint 1\n"

// Fingerprint returns the ABI fingerprint of a header tree, a toolchain and the variables in
// toolchain_env, for modules without BTF. toolchainTreeDigest is the digest of the toolchain's
// unpacked content, made by [cas.DigestTree]. The package comment says which files of the header tree the fingerprint
// leaves out.
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

// volatile reports whether a file of a header tree differs between two compilations of the same kernel, so that the
// fingerprint leaves it out. name is the file's slash path in the tree.
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
