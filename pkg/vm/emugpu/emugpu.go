// Package emugpu contains the source of a kernel module that emulates an NVIDIA GPU in a virtual machine. The module's
// code is GPL-2.0-only, like the kernel that loads it. It is compiled separately, and no program of Prebake links it.
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

// Name is the module's name. Its file is Name.ko.
const Name = "emugpu"

// KernelArg returns the argument for the kernel's command line that reserves memory for the emulated device. Arm
// kernels do not know memmap=. There, mem= makes the kernel use less memory than the machine has, and the device uses
// the rest.
func KernelArg(arch target.Arch) string {
	if arch == target.ARM64 {
		return "mem=2304M"
	}
	return "memmap=96M$0x4f000000"
}

// Memory returns the least memory in MiB that a machine with the emulated GPU needs.
func Memory(arch target.Arch) int {
	if arch == target.ARM64 {
		return 2304 + 128
	}
	return 2048
}

// Sources returns a file system with the files Kbuild and emugpu.c.
func Sources() fs.FS {
	sub, err := fs.Sub(sources, "module")
	if err != nil {
		panic(err) // Sub fails only for an invalid path
	}
	return sub
}

// WriteTo writes the sources into an existing folder. If one of the files exists already, WriteTo returns an error.
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
