// Package cossrc fetches what a COS release bucket holds about one build's
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
//     `uname -v` prints. No module can print it: package compile hides both
//     files from the compiler.
//
// Whatever else differs makes another fingerprint. That may cost a build that
// was not needed; the other mistake would cost a node.
//
// A toolchain that is not in the bucket itself is fetched from where the
// bucket's toolchain.tar.xz.gcs says, or, for old builds, toolchain_path or
// toolchain_url: from another bucket that is reached the same way.
//
// The description of the kernel's types, BTF, is taken out of vmlinux for who
// asks and where the kernel's configuration has BTF for modules. It decides over
// that of a module then, which fits no other kernel's, and so it counts. The rest
// of vmlinux, the build's number and time among it, does not.
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
	// BTF is a file with the description of the kernel's types, as vmlinux has it,
	// and BTFDigest its digest; both are "" unless asked for, and where the kernel
	// takes none with a module.
	BTF, BTFDigest string
	// Boot is the unpacked prebake-boot.tgz, and BootDigest that archive's
	// digest; both are "" where the bucket has none.
	Boot, BootDigest string
	// HasVMLinux says that the bucket has the kernel as it was linked, which
	// [FetchVMLinux] brings.
	HasVMLinux bool
	// SourceURL is where the kernel's source is, as kernel_info says; "" where
	// the bucket has none. It is told, and not fetched.
	SourceURL string
	Materials []Material
}

// Option asks for more than every build needs.
type Option func(*fetcher)

// WithBTF asks for the description of the kernel's types. A build whose kernel
// takes BTF with a module, and whose bucket has no vmlinux, is a
// fault.InputMissing.
func WithBTF() Option { return func(f *fetcher) { f.btf = true } }

// Kinds of cached trees and facts. The number changes with what is made of the
// same archive.
const (
	headersKind   = "headers-v1"
	toolchainKind = "toolchain-v1"
	bootKind      = "boot-v1"
	btfKind       = "btf-v1"
	digestKind    = "tree-digest-v1"
)

// Bounds of the archives: several times what real ones hold (COS: 120 MB of
// headers, 2.2 GB of toolchain).
var (
	headersLimits   = archive.Options{Entries: 200_000, Bytes: 2 << 30}
	toolchainLimits = archive.Options{Entries: 400_000, Bytes: 16 << 30}
	bootLimits      = archive.Options{Entries: 20_000, Bytes: 2 << 30}
)

// Fetch fetches the kernel inputs of one COS build into the cache. say receives progress, a line at a time; it may be
// nil.
func Fetch(ctx context.Context, b *cosbucket.Bucket, cache *cas.Cache, buildID, board string, say func(string),
	options ...Option) (*Inputs, error) {
	kernel, err := target.ParseKernel(buildID, board)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err, "name a build as a bucket does: --build-id 17800.66.78 --board lakitu")
	}
	f := &fetcher{Fetcher: input.Fetcher{Source: b, Cache: cache, Progress: say}, bucket: b, kernel: kernel}
	for _, o := range options {
		o(f)
	}
	in, err := f.run(ctx)
	if err != nil {
		return nil, fmt.Errorf("kernel %s: %w", kernel, err)
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
	env, envMaterial, err := f.small(ctx, cosbucket.ToolchainEnvName(f.kernel), maxEnv)
	if err != nil {
		return nil, err
	}
	if in.Env, err = ParseEnv(env); err != nil {
		return nil, err
	}
	var commitMaterial Material
	if in.Kernel.Commit, commitMaterial, err = f.commit(ctx); err != nil {
		return nil, err
	}
	if in.SourceURL, err = f.info(ctx); err != nil {
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
			if types, err = f.types(gctx, headersDir); err != nil {
				return err
			}
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
		if toolchain, err = f.toolchain(gctx, limits); err != nil {
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

// headersRoot finds the one usr/src/linux-headers-* folder of the archive.
func headersRoot(dir string) (string, error) {
	found, err := filepath.Glob(filepath.Join(dir, "usr", "src", "linux-headers-*"))
	if err != nil {
		return "", err
	}
	if len(found) != 1 {
		return "", fault.New(fault.Unsupported,
			fmt.Sprintf("read kernel-headers.tgz: %d folders usr/src/linux-headers-*; want one", len(found)),
			"check that the object is the header archive of a COS build")
	}
	// Lstat: what is behind a link is not part of the fingerprint.
	if fi, err := os.Lstat(found[0]); err != nil || !fi.IsDir() {
		return "", fault.New(fault.Unsupported,
			fmt.Sprintf("read kernel-headers.tgz: %s is no folder", filepath.Base(found[0])),
			"check that the object is the header archive of a COS build")
	}
	for _, must := range []string{"Makefile", ".config", "Module.symvers"} {
		fi, err := os.Lstat(filepath.Join(found[0], must))
		if err == nil && fi.Mode().IsRegular() && fi.Size() > 0 {
			continue
		}
		hint := "check that the object is the header archive of a COS build"
		if must == "Module.symvers" {
			hint = "publish a kernel-headers.tgz that holds the kernel's Module.symvers: modpost and the check of the modules " +
				"look up every symbol in it"
		}
		return "", fault.New(fault.Unsupported,
			fmt.Sprintf("read kernel-headers.tgz: no file %s, or nothing in it", path.Join(filepath.Base(found[0]), must)), hint)
	}
	return found[0], nil
}
