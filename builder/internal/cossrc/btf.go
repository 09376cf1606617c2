package cossrc

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	ocidigest "github.com/opencontainers/go-digest"

	"github.com/prebake/prebake/builder/internal/btf"
	"github.com/prebake/prebake/builder/internal/kconfig"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
)

// typesFile is the only file in a cached tree of btfKind.
const typesFile = "vmlinux.btf"

// kernelBTF extracts the kernel's BTF, the description of its types, from vmlinux. If the kernel is configured without
// BTF for modules, the part is empty.
func (f *fetcher) kernelBTF(ctx context.Context, headers string) (p part, err error) {
	text, err := readHead(headers, ".config", kconfig.Max+1)
	if err != nil {
		return p, err
	}
	config, err := kconfig.Parse(text)
	if err != nil {
		return p, err
	}
	if !config.On("CONFIG_DEBUG_INFO_BTF_MODULES") {
		f.Progressf("this kernel is configured without BTF for modules")
		return p, nil
	}
	err = f.tryLayouts(cosbucket.VMLinuxName(f.kernel), func(at string) error {
		sum, err := f.ChecksumFile(ctx, at)
		if err != nil {
			return err
		}
		m, file, err := f.Blob(ctx, at, sum)
		if err != nil {
			return err
		}
		dir, _, err := f.Cache.Tree(ctx, btfKind, m.Digest, func(ctx context.Context, dir string) error {
			if err := f.Recheck(ctx, at, sum, m); err != nil {
				return err
			}
			return extractTypes(file, filepath.Join(dir, typesFile))
		})
		if err != nil {
			return fmt.Errorf("read %s: %w", m.Name, err)
		}
		p = part{material: m, at: filepath.Join(dir, typesFile)}
		p.digest, err = f.treeDigest(ctx, btfKind, m.Digest, func() (string, error) {
			data, err := os.ReadFile(p.at)
			return ocidigest.FromBytes(data).String(), err
		})
		return err
	})
	return p, err
}

func extractTypes(vmlinux, to string) (err error) {
	f, err := os.Open(vmlinux)
	if err != nil {
		return err
	}
	defer f.Close() // the file was only read, so no error is lost
	data, err := btf.Read(f)
	if err == nil {
		_, err = btf.Parse(data)
	}
	if err != nil {
		return fault.Wrap(fault.Unsupported, err,
			"put the unstripped vmlinux of the COS build, with its section .BTF, into the bucket; or build without --btf")
	}
	return os.WriteFile(to, data, 0o644)
}
