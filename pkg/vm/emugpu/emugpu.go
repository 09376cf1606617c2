// Package emugpu holds the source of a kernel module that presents an emulated
// NVIDIA GPU to the kernel it is loaded into, for virtual machines that have
// none. The module's code is GPL-2.0-only, like the kernel it links into; it
// is compiled on its own, and no program of Prebake links it. The package
// refuses to compile anything.
package emugpu

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/prebake/prebake/pkg/target"
)

// The sources have a folder of their own because the go command refuses C
// files beside Go files that do not use cgo.
//
//go:embed module/Kbuild module/emugpu.c
var sources embed.FS

// Name is the module's name; its file is Name.ko.
const Name = "emugpu"

// KernelArg is what a kernel has to boot with: it takes the memory that serves
// as the device's away from the kernel. Arm kernels know no memmap=; there the
// machine has more memory than the kernel may use.
func KernelArg(arch target.Arch) string {
	if arch == target.ARM64 {
		return "mem=2304M"
	}
	return "memmap=96M$0x4f000000"
}

// Memory is how many MiB the machine has to have.
func Memory(arch target.Arch) int {
	if arch == target.ARM64 {
		return 2304 + 128
	}
	return 2048
}

// Sources returns Kbuild and emugpu.c.
func Sources() fs.FS {
	sub, err := fs.Sub(sources, "module")
	if err != nil {
		panic(err) // only for a name that is no path
	}
	return sub
}

// WriteTo writes the sources into an existing folder. Files that are there are
// an error.
func WriteTo(dir string) (err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("write sources of %s: %w", Name, err)
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	for _, name := range []string{"Kbuild", Name + ".c"} {
		text, err := fs.ReadFile(Sources(), name)
		if err != nil {
			return fmt.Errorf("write sources of %s: %w", Name, err)
		}
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if err != nil {
			return fmt.Errorf("write sources of %s: %w", Name, err)
		}
		_, err = f.Write(text)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("write sources of %s: %w", Name, err)
		}
	}
	return nil
}
