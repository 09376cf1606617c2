package modinfo

import (
	"cmp"
	"debug/elf"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Rules describe the kernel that modules are checked against.
type Rules struct {
	// Release is what `uname -r` prints; "" skips this check.
	Release string
	// Vermagic is the whole string that the kernel expects; "" skips this check.
	Vermagic string
	// Symvers is the kernel's Module.symvers.
	Symvers Symvers
	// ModVersions is true if the kernel compares checksums of symbols (CONFIG_MODVERSIONS).
	ModVersions bool
	// Machine is the kernel's processor architecture; EM_NONE skips this check.
	Machine elf.Machine
	// Salt is the kernel's CONFIG_BUILD_SALT, which may be empty. Nil skips this check.
	Salt *string
	// StructSize is sizeof(struct module) in the kernel, in bytes; 0 skips this check.
	StructSize uint64
	// MadeFor is the ABI fingerprint that the builder must have written into every module; "" skips this check.
	MadeFor string
}

// Problem is one reason why the kernel would refuse a module or crash after loading it.
type Problem struct {
	Module string
	// Symbol is the symbol that the problem is about. It may be empty.
	Symbol string
	// Text says what is wrong.
	Text string
	// Remedy is the hint for the person who compiles the module. It may be empty.
	Remedy string
}

func (p *Problem) Error() string {
	if p.Symbol == "" {
		return p.Module + ": " + p.Text
	}
	return p.Module + ": symbol " + p.Symbol + ": " + p.Text
}

const (
	remedyKernel  = "compile against the headers of exactly this COS build: several COS builds share one kernel release"
	remedyDriver  = "choose a driver release that supports this kernel"
	remedyDepends = "compile the needed module too, and check both modules together"
	remedySet     = "compile all modules of the driver in one run"
	remedyLicense = "choose the open flavour, or a driver release that supports this kernel"
)

// maxProblems is the maximum number of a module's problems that Check reports in full; it counts the rest.
const maxProblems = 8

// Check returns an error if this kernel would refuse the modules when they are loaded together. The error is of kind
// fault.CheckFailed, and wraps a [Problem] for each reason, up to maxProblems reasons for one module.
func Check(mods []*Module, rules Rules) error {
	c := checker{rules: rules, set: map[string]*Module{}, exporter: map[string]*Module{}, own: rules.Symvers.modules()}
	var errs []error
	if len(mods) == 0 {
		errs = append(errs, &Problem{Module: "modules", Text: "no module is given", Remedy: remedySet})
	}
	for _, m := range mods {
		if c.set[m.Name] != nil {
			errs = append(errs, &Problem{Module: m.Name, Text: "is given twice", Remedy: remedySet})
		}
		c.set[m.Name] = m
		for _, name := range m.Exports {
			if other := c.exporter[name]; other != nil && other != m {
				errs = append(errs, &Problem{m.Name, name, "is also exported by module " + other.Name, remedySet})
			}
			c.exporter[name] = m
		}
	}
	if _, err := Order(mods); err != nil {
		errs = append(errs, err)
	}
	for _, name := range slices.Sorted(maps.Keys(c.set)) {
		c.problems = nil
		c.module(c.set[name])
		for i, p := range c.problems {
			if i == maxProblems {
				errs = append(errs, &Problem{Module: name, Text: fmt.Sprintf("%d more problems", len(c.problems)-i)})
				break
			}
			errs = append(errs, p)
		}
	}
	if len(errs) == 0 {
		return nil
	}
	remedy := ""
	if p := (*Problem)(nil); errors.As(errs[0], &p) {
		remedy = p.Remedy
	}
	return fault.Wrap(fault.CheckFailed, errors.Join(errs...), remedy)
}

type checker struct {
	rules    Rules
	set      map[string]*Module
	exporter map[string]*Module // from a symbol to the module in the set that exports it
	own      map[string]bool    // names of the kernel's own modules that export symbols
	problems []*Problem
}

func (c *checker) add(m *Module, symbol, remedy, format string, args ...any) {
	c.problems = append(c.problems, &Problem{m.Name, symbol, fmt.Sprintf(format, args...), remedy})
}

func (c *checker) module(m *Module) {
	release, _, _ := strings.Cut(m.Vermagic, " ")
	switch {
	case c.rules.Release != "" && release != c.rules.Release:
		c.add(m, "", remedyKernel, "made for kernel release %s; this kernel has release %s", release, c.rules.Release)
	case c.rules.Vermagic != "" && m.Vermagic != strings.TrimSpace(c.rules.Vermagic):
		c.add(m, "", remedyKernel, "vermagic %q; this kernel wants %q", m.Vermagic, strings.TrimSpace(c.rules.Vermagic))
	}
	c.origin(m)
	needs := map[string]bool{}
	for _, name := range m.Depends {
		name = Canonical(name)
		needs[name] = true
		if c.set[name] == nil && !c.own[name] {
			c.add(m, "", remedyDepends, "needs module %s, which is neither one of these modules nor a module of the kernel",
				name)
		}
	}
	for _, s := range m.Imports {
		c.symbol(m, s, needs)
	}
	// CRCs also has checksums of names that are not imported, such as module_layout. The kernel compares them too.
	if c.rules.ModVersions {
		for _, name := range slices.Sorted(maps.Keys(m.CRCs)) {
			if _, imported := slices.BinarySearchFunc(m.Imports, name,
				func(s Symbol, name string) int { return cmp.Compare(s.Name, name) }); imported {
				continue
			}
			if export, ok := c.rules.Symvers[name]; ok {
				c.crc(m, name, export.CRC, "this kernel's")
			}
		}
	}
}

// origin checks that a module was built with the source tree of this kernel. Sibling kernels may have the same release
// and no checksums. Modules for such siblings differ only in the salt, the size of struct module and the ABI
// fingerprint in the builder's note.
func (c *checker) origin(m *Module) {
	if c.rules.Machine != elf.EM_NONE && m.Machine != c.rules.Machine {
		c.add(m, "", remedyKernel, "made for processor %v; this kernel is for processor %v", m.Machine, c.rules.Machine)
	}
	if salt := c.rules.Salt; salt != nil && m.Salt != *salt {
		c.add(m, "", remedyKernel, "made for a kernel with build salt %q; this kernel has build salt %q", m.Salt, *salt)
	}
	if size := c.rules.StructSize; size != 0 && m.StructSize != size {
		c.add(m, "", remedyKernel, "struct module has %d bytes in this module, and %d bytes in this kernel", m.StructSize,
			size)
	}
	switch want := c.rules.MadeFor; {
	case want == "" || m.MadeFor == want:
	case m.MadeFor == "":
		c.add(m, "", remedyKernel, "has no ABI fingerprint in section %s; this kernel has ABI fingerprint %s", StampSection,
			want)
	default:
		c.add(m, "", remedyKernel, "made for ABI fingerprint %s; this kernel has ABI fingerprint %s", m.MadeFor, want)
	}
}

func (c *checker) symbol(m *Module, s Symbol, needs map[string]bool) {
	// The assemblers for x86 and Arm add this symbol, and the kernel ignores it.
	if s.Name == "_GLOBAL_OFFSET_TABLE_" {
		return
	}
	if export, ok := c.rules.Symvers[s.Name]; ok {
		if c.rules.ModVersions {
			c.crc(m, s.Name, export.CRC, "this kernel's")
		}
		if from := export.provider(); from != "vmlinux" && !needs[from] {
			c.add(m, s.Name, remedySet, "is exported by the kernel's module %s, on which this module does not depend", from)
		}
		if export.GPL && !gplCompatible(m.License) {
			c.add(m, s.Name, remedyLicense, "is for GPL modules only; the licence of this module is %q", m.License)
		}
		if ns := export.Namespace; ns != "" && !slices.Contains(m.Namespaces, ns) {
			c.add(m, s.Name, remedyDriver, "is in namespace %s, which this module does not import", ns)
		}
		return
	}
	sibling := c.exporter[s.Name]
	switch {
	case sibling == m:
		c.add(m, s.Name, remedySet, "is exported by this module, and also undefined in it")
	case sibling != nil && !needs[sibling.Name]:
		c.add(m, s.Name, remedySet, "is exported by module %s, on which this module does not depend", sibling.Name)
	case sibling != nil && c.rules.ModVersions:
		if crc, ok := sibling.ExportCRCs[s.Name]; ok {
			c.crc(m, s.Name, crc, sibling.Name+"'s")
		} else {
			c.add(m, s.Name, remedySet, "has no checksum in %s, and this kernel compares checksums", sibling.Name)
		}
	case sibling == nil && !s.Weak:
		c.add(m, s.Name, remedyDriver, "is exported neither by this kernel nor by one of these modules")
	}
}

func (c *checker) crc(m *Module, symbol string, want uint32, whose string) {
	got, ok := m.CRCs[symbol]
	if !ok {
		c.add(m, symbol, remedyKernel, "has no checksum, and this kernel compares checksums")
	} else if got != want {
		c.add(m, symbol, remedyKernel, "checksum 0x%08x differs from %s 0x%08x", got, whose, want)
	}
}

// gplCompatible reports whether the kernel treats a licence as compatible with the GPL (license_is_gpl_compatible in
// include/linux/license.h).
func gplCompatible(license string) bool {
	switch license {
	case "GPL", "GPL v2", "GPL and additional rights", "Dual BSD/GPL", "Dual MIT/GPL", "Dual MPL/GPL":
		return true
	}
	return false
}

// Order sorts the modules for loading: each after the modules on which it depends, otherwise by name. It returns an
// error if a module depends on itself, directly or through others.
func Order(mods []*Module) ([]*Module, error) {
	waiting := map[string]*Module{}
	for _, m := range mods {
		waiting[m.Name] = m
	}
	var ordered []*Module
	for len(waiting) > 0 {
		var ready []string
		for name, m := range waiting {
			if !slices.ContainsFunc(m.Depends, func(d string) bool { return waiting[Canonical(d)] != nil }) {
				ready = append(ready, name)
			}
		}
		if len(ready) == 0 {
			names := slices.Sorted(maps.Keys(waiting))
			return nil, fault.Wrap(fault.CheckFailed,
				&Problem{Module: names[0], Text: "depends on itself through " + strings.Join(names, ", "), Remedy: remedySet},
				remedySet)
		}
		// Each round takes only one module, so that an additional module does not change the order of the others.
		next := slices.Min(ready)
		ordered = append(ordered, waiting[next])
		delete(waiting, next)
	}
	return ordered, nil
}
