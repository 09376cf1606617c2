// Package cossrc brings what a COS release bucket holds about one build's
// kernel into the cache: header tree, toolchain, compiler names, and, where
// there is one, the image that boots it in a test machine. From these it takes
// the kernel's release and version and computes its ABI fingerprint.
//
// The fingerprint covers everything that decides whether a module fits: the
// content of the header tree (Module.symvers, .config and the prebuilt host
// tools among it), the content of the toolchain, and toolchain_env. Three
// things are left out, each because it differs between builds of one and the
// same kernel and no module depends on it:
//
//   - times, owners and mode bits other than the executable one: they are the
//     packer's;
//   - include/generated/compile.h: who compiled the kernel, where and when;
//   - include/generated/utsversion.h: the build's number and time, which
//     `uname -v` prints. A module that prints it prints that of the kernel it
//     was compiled for.
//
// Whatever else differs makes another fingerprint. That may cost a build that
// was not needed; the other mistake would cost a node.
//
// It refuses inputs that differ from their checksum, and never guesses a
// kernel's release.
package cossrc

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/builder/internal/input"
	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Material is one input, as provenance names it.
type Material = input.Material

// Inputs are the kernel inputs of one COS build. The folders are in the cache:
// nobody may write to them.
type Inputs struct {
	Kernel      target.Kernel
	Fingerprint target.Fingerprint
	// Headers is the header tree itself, the one with Makefile and .config.
	Headers string
	// HeadersDigest is the digest of its content, less what the package comment
	// leaves out of the fingerprint.
	HeadersDigest string
	// Toolchain is the root of the unpacked toolchain archive, and
	// ToolchainDigest the digest of its content.
	Toolchain, ToolchainDigest string
	// Env is toolchain_env: CC and CXX.
	Env map[string]string
	// Boot is the unpacked prebake-boot.tgz, and BootDigest that archive's
	// digest; both are "" where the bucket has none.
	Boot, BootDigest string
	Materials        []Material
}

// Kinds of cached trees and facts. The number changes with what is made of the
// same archive.
const (
	headersKind   = "headers-v1"
	toolchainKind = "toolchain-v1"
	bootKind      = "boot-v1"
	digestKind    = "tree-digest-v1"
)

// Bounds of the archives: several times what real ones hold (COS: 120 MB of
// headers, 2.2 GB of toolchain).
var (
	headersLimits   = archive.Options{Entries: 200_000, Bytes: 2 << 30}
	toolchainLimits = archive.Options{Entries: 400_000, Bytes: 16 << 30}
	bootLimits      = archive.Options{Entries: 20_000, Bytes: 2 << 30}
)

// Fetch brings the kernel inputs of one COS build into the cache. say is told
// about progress, a line at a time; it may be nil.
func Fetch(ctx context.Context, b *cosbucket.Bucket, cache *cas.Cache, buildID, board string, say func(string)) (*Inputs, error) {
	return fetch(ctx, b, cache, buildID, board, say)
}

func fetch(ctx context.Context, b input.Source, cache *cas.Cache, buildID, board string, say func(string)) (*Inputs, error) {
	kernel, err := target.ParseKernel(buildID, board)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err, "name a build as a bucket does: --build-id 17800.66.78 --board lakitu")
	}
	f := &fetcher{Fetcher: input.Fetcher{Source: b, Cache: cache, Say: say}, kernel: kernel}
	in, err := f.run(ctx)
	if err != nil {
		err = fmt.Errorf("kernel %s: %w", kernel, err)
		if fault.Is(err, fault.InputMissing) && fault.Hint(err) == "" {
			err = fault.Wrap(fault.InputMissing, err, "check BUILD_ID and board: the bucket is asked for "+b.URL(cosbucket.HeadersName(kernel)))
		}
		return nil, err
	}
	return in, nil
}

type fetcher struct {
	input.Fetcher
	kernel target.Kernel
}

// part is one archive of the build, unpacked.
type part struct {
	material Material
	dir      string // the cached tree
	digest   string // of the tree's content; "" where nobody asked
}

func (f *fetcher) run(ctx context.Context) (*Inputs, error) {
	in := &Inputs{Kernel: f.kernel}
	env, envMaterial, err := f.Small(ctx, cosbucket.ToolchainEnvName(f.kernel), maxEnv)
	if err != nil {
		return nil, err
	}
	if in.Env, err = ParseEnv(env); err != nil {
		return nil, err
	}
	commit, commitMaterial, err := f.commit(ctx)
	if err != nil {
		return nil, err
	}
	in.Kernel.Commit = commit

	var headers, toolchain, boot part
	var headersDir string
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		if headers, err = f.unpack(gctx, cosbucket.HeadersName(f.kernel), headersKind, headersLimits); err != nil {
			return err
		}
		if headersDir, err = headersRoot(headers.dir); err != nil {
			return err
		}
		headers.digest, err = f.treeDigest(gctx, headersKind, headers.material.Digest, func() (string, error) { return digestHeaders(gctx, headersDir) })
		if err != nil {
			return err
		}
		boot, err = f.unpack(gctx, cosbucket.BootName(f.kernel), bootKind, bootLimits)
		if fault.Is(err, fault.InputMissing) {
			return nil // COS's own buckets have none
		}
		return err
	})
	g.Go(func() (err error) {
		// xz in Go takes a minute and more for the gigabytes of a real toolchain.
		limits := toolchainLimits
		if limits.XZTool, err = exec.LookPath("xz"); err != nil {
			limits.XZTool = ""
		}
		if toolchain, err = f.unpack(gctx, cosbucket.ToolchainName(f.kernel), toolchainKind, limits); err != nil {
			return err
		}
		toolchain.digest, err = f.treeDigest(gctx, toolchainKind, toolchain.material.Digest, func() (string, error) { return cas.DigestTree(gctx, toolchain.dir, nil) })
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	in.Headers, in.Toolchain, in.Boot, in.BootDigest = headersDir, toolchain.dir, boot.dir, boot.material.Digest
	if in.Kernel.Release, in.Kernel.Version, err = readRelease(headersDir); err != nil {
		return nil, err
	}
	in.HeadersDigest, in.ToolchainDigest = headers.digest, toolchain.digest
	in.Fingerprint = combine(headers.digest, toolchain.digest, in.Env)
	for _, m := range []Material{headers.material, toolchain.material, envMaterial, commitMaterial, boot.material} {
		if m.Digest != "" {
			in.Materials = append(in.Materials, m)
		}
	}
	return in, nil
}

// commit reads kernel_commit, which old builds lack.
func (f *fetcher) commit(ctx context.Context) (string, Material, error) {
	text, m, err := f.Small(ctx, cosbucket.CommitName(f.kernel), 1<<10)
	if fault.Is(err, fault.InputMissing) {
		return "", Material{}, nil
	}
	if err != nil {
		return "", Material{}, err
	}
	commit := strings.TrimSpace(string(text))
	if !target.ValidCommit(commit) {
		return "", Material{}, fault.New(fault.Checksum, fmt.Sprintf("read kernel_commit: %.60q is not a commit of 40 hex digits", commit), "replace "+m.URI)
	}
	return commit, m, nil
}

// unpack fetches an archive and unpacks it, once for each content.
func (f *fetcher) unpack(ctx context.Context, name, kind string, o archive.Options) (part, error) {
	sum, err := f.SumBeside(ctx, name)
	if err != nil {
		return part{}, err
	}
	m, file, err := f.Blob(ctx, name, sum)
	if err != nil {
		return part{}, err
	}
	if m.Unverified {
		f.Sayf("%s: the bucket has no checksum for it", m.Name)
	}
	o.Outside = func(link, to string) { f.Sayf("%s: left out link %s, which leads out to %s", m.Name, link, to) }
	dir, cached, err := f.Cache.Tree(ctx, kind, m.Digest, func(ctx context.Context, dir string) error {
		if err := f.Recheck(ctx, name, sum, m); err != nil {
			return err
		}
		_, err := archive.UnpackFile(ctx, file, dir, o)
		return err
	})
	if err != nil {
		return part{}, fmt.Errorf("unpack %s: %w", m.Name, err)
	}
	if !cached {
		f.Sayf("%s: unpacked", m.Name)
	}
	return part{material: m, dir: dir}, nil
}

// treeDigest computes a tree's digest once for each archive.
func (f *fetcher) treeDigest(ctx context.Context, kind, blob string, compute func() (string, error)) (string, error) {
	key := kind + "\n" + blob
	if known, ok := f.Cache.Recall(digestKind, key); ok {
		if fp, err := target.ParseFingerprint(string(known)); err == nil {
			return string(fp), nil
		}
	}
	digest, err := compute()
	if err != nil {
		return "", err
	}
	return digest, f.Cache.Remember(digestKind, key, []byte(digest))
}

// headersRoot finds the one usr/src/linux-headers-* folder of the archive.
func headersRoot(dir string) (string, error) {
	found, err := filepath.Glob(filepath.Join(dir, "usr", "src", "linux-headers-*"))
	if err != nil {
		return "", err
	}
	if len(found) != 1 {
		return "", fault.New(fault.Unsupported, fmt.Sprintf("read kernel-headers.tgz: %d folders usr/src/linux-headers-*; want one", len(found)),
			"check that the object is the header archive of a COS build")
	}
	// Lstat: what is behind a link is not part of the fingerprint.
	if fi, err := os.Lstat(found[0]); err != nil || !fi.IsDir() {
		return "", fault.New(fault.Unsupported, fmt.Sprintf("read kernel-headers.tgz: %s is no folder", filepath.Base(found[0])),
			"check that the object is the header archive of a COS build")
	}
	for _, must := range []string{"Makefile", ".config", "Module.symvers"} {
		if fi, err := os.Lstat(filepath.Join(found[0], must)); err != nil || !fi.Mode().IsRegular() {
			return "", fault.New(fault.Unsupported, fmt.Sprintf("read kernel-headers.tgz: no file %s", path.Join(filepath.Base(found[0]), must)),
				"check that the object is the header archive of a COS build")
		}
	}
	return found[0], nil
}
