// Package cossrc fetches the kernel inputs of one COS build into the cache: the header tree, the toolchain,
// toolchain_env and, if there is one, the boot archive for the load test. It reads the kernel's release and version
// from the header tree and computes the kernel's ABI fingerprint.
//
// The fingerprint covers everything that decides whether a module fits the kernel: the content of the header tree (with
// Module.symvers, .config and the prebuilt host tools), the content of the toolchain, and toolchain_env. It leaves out
// three things that differ between two compilations of the same kernel:
//
//   - times, owners and mode bits (the executable bit is covered);
//   - include/generated/compile.h, which says who compiled the kernel, where and when;
//   - include/generated/utsversion.h, which has the build's number and time, as `uname -v` prints them.
//
// No module can contain a text of these two files, because package compile hides their values from the compiler.
//
// Any other difference gives another fingerprint, even if the same modules fit both kernels. The price is a needless
// build. With one fingerprint for two different kernels, a node would load modules that do not fit.
//
// If the bucket has no toolchain.tar.xz, the object toolchain.tar.xz.gcs (in old COS builds toolchain_path or
// toolchain_url) says in which other bucket the toolchain is. [cosbucket.Bucket.Sibling] finds that bucket.
//
// If the caller asks for BTF, the description of the kernel's types, the package takes it from vmlinux. A module's BTF
// fits only one kernel's BTF. So the kernel's BTF is then part of the fingerprint; the rest of vmlinux is not.
//
// The package refuses inputs that differ from their checksum, and never guesses a kernel's release.
package cossrc

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/builder/internal/input"
	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Material is one input of a build, as the provenance lists it.
type Material = input.Material

// Inputs are the kernel inputs of one COS build. Nobody may write to the folders, which are in the cache.
type Inputs struct {
	Kernel      target.Kernel
	Fingerprint target.Fingerprint
	// Headers is the root of the header tree, the folder with Makefile and .config.
	Headers string
	// HeadersDigest is the digest of the header tree without the files that the fingerprint leaves out.
	HeadersDigest string
	// Toolchain is the root of the unpacked toolchain. ToolchainDigest is the digest of its content.
	Toolchain, ToolchainDigest string
	// Env is the content of toolchain_env: CC and CXX.
	Env map[string]string
	// BTF is the path of a file with the kernel's BTF, and BTFDigest is its digest. Both are "" without [WithBTF], or if
	// the kernel is configured without BTF for modules.
	BTF, BTFDigest string
	// Boot is the folder of the unpacked boot archive, prebake-boot.tgz. BootDigest is the archive's digest. Both are ""
	// if the bucket has none.
	Boot, BootDigest string
	// HasVMLinux is true if the bucket has vmlinux, the linked kernel, and Boot is not set. [FetchVMLinux] fetches
	// vmlinux.
	HasVMLinux bool
	// SourceURL is the URL of the kernel's source from kernel_info, or "". It is for people: Prebake does not fetch the
	// source.
	SourceURL string
	// Materials are the objects that were fetched, for the provenance.
	Materials []Material
}

// Option asks Fetch for an input that not every build needs.
type Option func(*fetcher)

// WithBTF asks for the kernel's BTF. If the kernel has BTF for modules and the bucket has no vmlinux, Fetch returns
// fault.InputMissing.
func WithBTF() Option { return func(f *fetcher) { f.btf = true } }

// Kinds of cached trees and facts. Raise a number when the code makes another tree or digest from the same archive.
const (
	headersKind   = "headers-v1"
	toolchainKind = "toolchain-v1"
	bootKind      = "boot-v1"
	btfKind       = "btf-v1"
	digestKind    = "tree-digest-v1"
)

// Limits of the unpacked archives. COS has 120 MB of headers and 2.2 GB of toolchain.
var (
	headersLimits   = archive.Options{Entries: 200_000, Bytes: 2 << 30}
	toolchainLimits = archive.Options{Entries: 400_000, Bytes: 16 << 30}
	bootLimits      = archive.Options{Entries: 20_000, Bytes: 2 << 30}
)

// Fetch fetches the kernel inputs of one COS build into the cache. It calls say with its progress, one line at a time;
// say may be nil.
func Fetch(ctx context.Context, b *cosbucket.Bucket, cache *cas.Cache, buildID, board string, say func(string),
	options ...Option) (*Inputs, error) {
	kernel, err := target.ParseKernel(buildID, board)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err,
			"give a COS build and a board, such as --build-id 17800.66.78 --board lakitu")
	}
	f := &fetcher{Fetcher: input.Fetcher{Source: b, Cache: cache, Progress: say}, bucket: b, kernel: kernel}
	for _, o := range options {
		o(f)
	}
	in, err := f.run(ctx)
	if err != nil {
		return nil, fmt.Errorf("fetch the files of kernel %s: %w", kernel, err)
	}
	return in, nil
}

type fetcher struct {
	input.Fetcher
	bucket *cosbucket.Bucket
	kernel target.Kernel
	btf    bool
}

func (f *fetcher) run(ctx context.Context) (*Inputs, error) {
	in := &Inputs{Kernel: f.kernel}
	env, envMaterial, err := f.readSmall(ctx, cosbucket.ToolchainEnvName(f.kernel), maxEnv)
	if err != nil {
		return nil, err
	}
	if in.Env, err = ParseEnv(env); err != nil {
		return nil, err
	}
	var commitMaterial Material
	if in.Kernel.Commit, commitMaterial, err = f.readCommit(ctx); err != nil {
		return nil, err
	}
	if in.SourceURL, err = f.readInfo(ctx); err != nil {
		return nil, err
	}

	var headers, toolchain, boot, types part
	var headersDir string
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		if headers, err = f.unpack(gctx, cosbucket.HeadersName(f.kernel), headersKind, headersLimits); err != nil {
			return err
		}
		if headersDir, err = headersRoot(headers.at); err != nil {
			return err
		}
		headers.digest, err = f.treeDigest(gctx, headersKind, headers.material.Digest,
			func() (string, error) { return digestHeaders(gctx, headersDir) })
		if err != nil {
			return err
		}
		if f.btf {
			if types, err = f.kernelBTF(gctx, headersDir); err != nil {
				return err
			}
		}
		boot, err = f.unpack(gctx, cosbucket.BootName(f.kernel), bootKind, bootLimits)
		if fault.Is(err, fault.InputMissing) {
			return nil // COS's own buckets have no boot archive
		}
		return err
	})
	g.Go(func() (err error) {
		if toolchain, err = f.toolchain(gctx, unpackToolchain(withXZ(toolchainLimits))); err != nil {
			return err
		}
		toolchain.digest, err = f.treeDigest(gctx, toolchainKind, toolchain.material.Digest,
			func() (string, error) { return cas.DigestTree(gctx, toolchain.at, nil) })
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	in.Headers, in.HeadersDigest = headersDir, headers.digest
	in.Toolchain, in.ToolchainDigest = toolchain.at, toolchain.digest
	in.BTF, in.BTFDigest = types.at, types.digest
	in.Boot, in.BootDigest = boot.at, boot.material.Digest
	if in.Boot == "" {
		if in.HasVMLinux, err = f.hasVMLinux(ctx); err != nil {
			return nil, err
		}
	}
	if in.Kernel.Release, in.Kernel.Version, err = readRelease(headersDir); err != nil {
		return nil, err
	}
	in.Fingerprint = combine(headers.digest, toolchain.digest, types.digest, in.Env)
	for _, m := range []Material{headers.material, toolchain.material, toolchain.pointer, envMaterial, commitMaterial,
		types.material, boot.material} {
		if m.Digest != "" {
			in.Materials = append(in.Materials, m)
		}
	}
	return in, nil
}

// withXZ adds the path of the program xz to the options, if this machine has it. The program is faster than the decoder
// in Go, which takes more than a minute for a toolchain of gigabytes.
func withXZ(o archive.Options) archive.Options {
	if tool, err := exec.LookPath("xz"); err == nil {
		o.XZTool = tool
	}
	return o
}

// headersRoot returns the only usr/src/linux-headers-* folder of the archive.
func headersRoot(dir string) (string, error) {
	found, err := filepath.Glob(filepath.Join(dir, "usr", "src", "linux-headers-*"))
	if err != nil {
		return "", err
	}
	if len(found) != 1 {
		return "", fault.New(fault.Unsupported,
			fmt.Sprintf("read kernel-headers.tgz: the archive has %d folders usr/src/linux-headers-*; want one", len(found)),
			"check that kernel-headers.tgz is the header archive of a COS build")
	}
	// Lstat does not follow a link. Refuse it, because the fingerprint would not cover its target.
	if fi, err := os.Lstat(found[0]); err != nil || !fi.IsDir() {
		return "", fault.New(fault.Unsupported,
			fmt.Sprintf("read kernel-headers.tgz: %s is not a folder", filepath.Base(found[0])),
			"check that kernel-headers.tgz is the header archive of a COS build")
	}
	for _, must := range []string{"Makefile", ".config", "Module.symvers"} {
		fi, err := os.Lstat(filepath.Join(found[0], must))
		if err == nil && fi.Mode().IsRegular() && fi.Size() > 0 {
			continue
		}
		hint := "check that kernel-headers.tgz is the header archive of a COS build"
		if must == "Module.symvers" {
			hint = "put a kernel-headers.tgz with the kernel's Module.symvers into the bucket, because modpost and the " +
				"check of the modules look up every symbol in Module.symvers"
		}
		return "", fault.New(fault.Unsupported,
			fmt.Sprintf("read kernel-headers.tgz: %s is missing or empty", path.Join(filepath.Base(found[0]), must)), hint)
	}
	return found[0], nil
}
