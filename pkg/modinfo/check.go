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

// Rules is the kernel that modules are checked against.
type Rules struct {
	// Release is `uname -r`; "" skips this check.
	Release string
	// Vermagic is the whole string that the kernel wants; "" skips this check.
	Vermagic string
	// Symvers is the kernel's Module.symvers.
	Symvers Symvers
	// ModVersions says that the kernel compares checksums.
	ModVersions bool
	// Machine is the kernel's processor; EM_NONE skips this check.
	Machine elf.Machine
	// Salt is the kernel's CONFIG_BUILD_SALT, which may be empty; nil skips this check.
	Salt *string
	// StructSize is sizeof(struct module) of the kernel; 0 skips this check.
	StructSize uint64
	// MadeFor is the ABI fingerprint that every module has to be stamped with;
	// "" skips this check.
	MadeFor string
}

// Problem is one reason for the kernel to refuse a module, or to crash with it.
type Problem struct {
	Module string
	// Symbol is the symbol that the problem is about; may be empty.
	Symbol string
	Text   string
	Remedy string
}

func (p *Problem) Error() string {
	if p.Symbol == "" {
		return p.Module + ": " + p.Text
	}
	return p.Module + ": symbol " + p.Symbol + ": " + p.Text
}

const (
	remedyKernel  = "compile against the headers of exactly this COS build: several builds share one release name"
	remedyDriver  = "choose a driver release that supports this kernel"
	remedyDepends = "add the module that it needs to the same set"
	remedySet     = "compile all modules of the set in one run"
	remedyLicense = "choose the open flavour, or a driver release that supports this kernel"
)

// maxProblems bounds what Check reports for each module.
const maxProblems = 8

// Check reports every reason why the kernel of these rules would refuse the
// modules, loaded as one set; fault.CheckFailed holds them all, as [Problem]s.
func Check(mods []*Module, rules Rules) error {
	c := checker{rules: rules, set: map[string]*Module{}, exporter: map[string]*Module{}, own: rules.Symvers.modules()}
	var errs []error
	if len(mods) == 0 {
		errs = append(errs, &Problem{Module: "set", Text: "holds no module", Remedy: remedySet})
	}
	for _, m := range mods {
		if c.set[m.Name] != nil {
			errs = append(errs, &Problem{Module: m.Name, Text: "is in the set twice", Remedy: remedySet})
		}
		c.set[m.Name] = m
		for _, name := range m.Exports {
			if other := c.exporter[name]; other != nil && other != m {
				errs = append(errs, &Problem{m.Name, name, "is exported by " + other.Name + " too", remedySet})
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
				errs = append(errs, &Problem{Module: name, Text: fmt.Sprintf("%d more", len(c.problems)-i)})
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
	exporter map[string]*Module // by symbol
	own      map[string]bool    // the kernel's own modules that export symbols
	problems []*Problem
}

func (c *checker) add(m *Module, symbol, remedy, format string, args ...any) {
	c.problems = append(c.problems, &Problem{m.Name, symbol, fmt.Sprintf(format, args...), remedy})
}

func (c *checker) module(m *Module) {
	release, _, _ := strings.Cut(m.Vermagic, " ")
	switch {
	case c.rules.Release != "" && release != c.rules.Release:
		c.add(m, "", remedyKernel, "made for release %s; this kernel is %s", release, c.rules.Release)
	case c.rules.Vermagic != "" && m.Vermagic != strings.TrimSpace(c.rules.Vermagic):
		c.add(m, "", remedyKernel, "vermagic %q; this kernel wants %q", m.Vermagic, strings.TrimSpace(c.rules.Vermagic))
	}
	c.origin(m)
	needs := map[string]bool{}
	for _, name := range m.Depends {
		name = Canonical(name)
		needs[name] = true
		if c.set[name] == nil && !c.own[name] {
			c.add(m, "", remedyDepends, "needs module %s, which is neither in the set nor one of the kernel's", name)
		}
	}
	for _, s := range m.Imports {
		c.symbol(m, s, needs)
	}
	// module_layout and other names without a symbol entry of their own.
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

// origin holds what a module tells about the kernel tree that it was made from
// against the kernel. Where releases repeat and the kernel compares no
// checksums, nothing else tells siblings apart.
func (c *checker) origin(m *Module) {
	if c.rules.Machine != elf.EM_NONE && m.Machine != c.rules.Machine {
		c.add(m, "", remedyKernel, "made for processor %v; this kernel's is %v", m.Machine, c.rules.Machine)
	}
	if salt := c.rules.Salt; salt != nil && m.Salt != *salt {
		c.add(m, "", remedyKernel, "made for a kernel with build salt %q; this kernel's is %q", m.Salt, *salt)
	}
	if size := c.rules.StructSize; size != 0 && m.StructSize != size {
		c.add(m, "", remedyKernel, "struct module has %d bytes in it; in this kernel %d", m.StructSize, size)
	}
	switch want := c.rules.MadeFor; {
	case want == "" || m.MadeFor == want:
	case m.MadeFor == "":
		c.add(m, "", remedyKernel, "does not say what kernel it was made for; this kernel is %s", want)
	default:
		c.add(m, "", remedyKernel, "made for kernel %s; this kernel is %s", m.MadeFor, want)
	}
}

func (c *checker) symbol(m *Module, s Symbol, needs map[string]bool) {
	// The kernel's loader skips this name of the x86 and Arm assemblers.
	if s.Name == "_GLOBAL_OFFSET_TABLE_" {
		return
	}
	if export, ok := c.rules.Symvers[s.Name]; ok {
		if c.rules.ModVersions {
			c.crc(m, s.Name, export.CRC, "this kernel's")
		}
		if from := export.provider(); from != "vmlinux" && !needs[from] {
			c.add(m, s.Name, remedySet, "is exported by module %s, on which the module does not depend", from)
		}
		if export.GPL && !gplCompatible(m.License) {
			c.add(m, s.Name, remedyLicense, "is for GPL modules only; this one's licence is %q", m.License)
		}
		if ns := export.Namespace; ns != "" && !slices.Contains(m.Namespaces, ns) {
			c.add(m, s.Name, remedyDriver, "is in namespace %s, which the module does not import", ns)
		}
		return
	}
	sibling := c.exporter[s.Name]
	switch {
	case sibling == m:
		c.add(m, s.Name, remedySet, "is exported and undefined at once")
	case sibling != nil && !needs[sibling.Name]:
		c.add(m, s.Name, remedySet, "is exported by %s, on which the module does not depend", sibling.Name)
	case sibling != nil && c.rules.ModVersions:
		if crc, ok := sibling.ExportCRCs[s.Name]; ok {
			c.crc(m, s.Name, crc, sibling.Name+"'s")
		} else {
			c.add(m, s.Name, remedySet, "has no checksum in %s, and this kernel compares checksums", sibling.Name)
		}
	case sibling == nil && !s.Weak:
		c.add(m, s.Name, remedyDriver, "is exported neither by this kernel nor by a module of the set")
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

// gplCompatible is the kernel's own list (include/linux/license.h).
func gplCompatible(license string) bool {
	switch license {
	case "GPL", "GPL v2", "GPL and additional rights", "Dual BSD/GPL", "Dual MIT/GPL", "Dual MPL/GPL":
		return true
	}
	return false
}

// Order returns the modules so that each comes after those of the set that
// it depends on, and otherwise by name.
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
		// One at a time, so that the order is the same however the set grows.
		next := slices.Min(ready)
		ordered = append(ordered, waiting[next])
		delete(waiting, next)
	}
	return ordered, nil
}
