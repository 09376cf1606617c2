// Package modcheck checks modules before publishing, without running them. [Stamp] adds the stamp to a module: an ELF
// note with the ABI fingerprint of the module's kernel. [Check] compares a driver's modules with that kernel: its
// exported symbols, its configuration and its own modules.
//
// The package never compiles, loads or guesses. If the header tree lacks a fact, Check returns an error or skips the
// check that needs the fact. docs/background/checks.md says what the checks prove and what they cannot prove.
package modcheck

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/prebake/prebake/builder/internal/kconfig"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm"
)

// Recipe is the version of the code of [Stamp], and part of the cache keys of modules.
const Recipe = "stamp-1"

// Kernel describes the kernel against which modules are checked.
type Kernel struct {
	// Headers is the root of the kernel's header tree.
	Headers string
	// Boot is the folder of a bootable kernel. The kernel's modules there show the size of its struct module. If Boot is
	// "", the size is not checked.
	Boot string
	// Release is the kernel release, as `uname -r` prints it.
	Release string
	Arch    target.Arch
	// Fingerprint is the ABI fingerprint that every module must have in its stamp, the ELF note that [Stamp] adds. It
	// is "" for modules that Google signed: they have no stamp, because a stamp would change the signed bytes.
	Fingerprint target.Fingerprint
	// Version is the driver's version. If it is "", the versions of the modules are not checked.
	Version string
	// Open is true for the flavour open. Then no module's licence may taint the kernel.
	Open bool
	// BTF is the path of a file with the kernel's BTF, which the modules' BTF must continue. If it is "", modules that
	// Prebake compiled must have no BTF.
	BTF string
}

var machines = map[target.Arch]elf.Machine{target.AMD64: elf.EM_X86_64, target.ARM64: elf.EM_AARCH64}

// Check checks the modules of a driver, a map from names without .ko to files, and returns their vermagic. If the
// kernel would refuse a module, or crash with it, the error is fault.CheckFailed. The error lists every fault of the
// first failed step. If the header tree lacks .config or Module.symvers, the error is fault.InputMissing.
func Check(modules map[string]string, k Kernel) (vermagic string, err error) {
	rules, err := k.rules()
	if err != nil {
		return "", err
	}
	var mods []*modinfo.Module
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		m, err := Read(modules[name])
		if err != nil {
			return "", fmt.Errorf("module %s: %w", name, err)
		}
		if m.Name != modinfo.Canonical(name) {
			errs = append(errs, &modinfo.Problem{Module: name, Text: "the file is of a module with another name: " + m.Name})
		}
		if k.Version != "" && m.Version != "" && m.Version != k.Version {
			errs = append(
				errs,
				&modinfo.Problem{Module: name, Text: fmt.Sprintf("has driver version %s; want %s", m.Version, k.Version)},
			)
		}
		if k.Open && !slices.Contains(openLicences(), m.License) {
			errs = append(
				errs,
				&modinfo.Problem{
					Module: name,
					Text: fmt.Sprintf("has the licence %.40q; a module of flavour open must have a licence that does not taint "+
						"the kernel", m.License),
				},
			)
		}
		mods = append(mods, m)
	}
	if len(errs) > 0 {
		return "", fault.Wrap(fault.CheckFailed, errors.Join(errs...),
			"compile the modules again, from the sources of this driver")
	}
	if err := modinfo.Check(mods, rules); err != nil {
		return "", err
	}
	if err := k.checkTypes(modules); err != nil {
		return "", err
	}
	return mods[0].Vermagic, nil // modinfo.Check refuses an empty list of modules, so mods[0] exists
}

// openLicences returns the licences that do not taint a kernel (Linux, include/linux/license.h).
func openLicences() []string {
	return []string{"GPL", "GPL v2", "GPL and additional rights", "Dual BSD/GPL", "Dual MIT/GPL", "Dual MPL/GPL"}
}

// Read reads the facts that [Check] needs from a module's file.
func Read(path string) (*modinfo.Module, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() // the file is only read, so an error of Close loses nothing
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return modinfo.Read(f, info.Size())
}

func (k Kernel) rules() (modinfo.Rules, error) {
	var r modinfo.Rules
	config, err := kconfig.ReadFile(filepath.Join(k.Headers, ".config"))
	if err != nil {
		return r, err
	}
	symvers, err := os.Open(filepath.Join(k.Headers, "Module.symvers"))
	if err != nil {
		return r, fault.Wrap(fault.InputMissing, fmt.Errorf("read the kernel's exports: %w", err),
			"publish a kernel-headers.tgz that contains the kernel's Module.symvers")
	}
	defer symvers.Close() // the file is only read, so an error of Close loses nothing
	if r.Symvers, err = modinfo.ReadSymvers(symvers); err != nil {
		return r, err
	}
	salt := config.Text("CONFIG_BUILD_SALT")
	r.Release, r.Salt, r.Machine = k.Release, &salt, machines[k.Arch]
	r.ModVersions = config.On("CONFIG_MODVERSIONS")
	r.Vermagic = vermagicOf(config, k.Release, k.Arch)
	r.MadeFor = string(k.Fingerprint)
	r.StructSize, err = structSize(k.Boot)
	return r, err
}

// structSize returns sizeof(struct module) in bytes, from the kernel's modules in the boot folder, or 0 if none shows
// it.
func structSize(boot string) (uint64, error) {
	if boot == "" {
		return 0, nil
	}
	files, err := fs.Glob(os.DirFS(boot), vm.BootModules+"/*.ko")
	if err != nil {
		return 0, err
	}
	for _, name := range files {
		m, err := Read(filepath.Join(boot, name))
		if err != nil {
			return 0, fmt.Errorf("read the kernel's own module %s: %w", name, err)
		}
		if m.StructSize != 0 {
			return m.StructSize, nil
		}
	}
	return 0, nil
}
