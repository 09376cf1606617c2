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

// fingerprintScheme heads what is hashed. Another scheme needs another name:
// artifacts that are published already are matched by this one.
const fingerprintScheme = "prebake fingerprint 1\n"

// Fingerprint returns the ABI fingerprint of a header tree, a toolchain (the
// digest of its unpacked content, as [cas.DigestTree] makes it) and what
// toolchain_env sets, for modules that are made without BTF. The package comment
// says what does not count.
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
		return "", fmt.Errorf("fingerprint %s: %w", dir, err)
	}
	return digest, nil
}

// volatile tells the files of a header tree that differ between builds of one
// kernel.
func volatile(name string) bool {
	return name == "include/generated/compile.h" || name == "include/generated/utsversion.h"
}

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
