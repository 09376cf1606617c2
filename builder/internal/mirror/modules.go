package mirror

import (
	"bytes"
	"debug/elf"
	"fmt"
	"path"
	"slices"
	"strings"
)

// loadOrder returns the files in t of the wanted modules and all that they
// depend on, each after its own dependencies. A wanted module that is not there
// is built into the kernel and stays out; a dependency has to be there.
func loadOrder(t tree, wanted ...string) ([]string, error) {
	files := map[string]string{}
	for name := range t {
		if path.Ext(name) == ".ko" {
			files[moduleName(name)] = name
		}
	}
	var order []string
	open := map[string]bool{}
	var visit func(module string) error
	visit = func(module string) error {
		file := files[module]
		if slices.Contains(order, file) {
			return nil
		}
		if open[module] {
			return fmt.Errorf("read module %s: it depends on itself", file)
		}
		open[module] = true
		deps, err := moduleDepends(t[file].data)
		if err != nil {
			return fmt.Errorf("read module %s: %w", file, err)
		}
		for _, dep := range deps {
			if files[dep] == "" {
				return fmt.Errorf("read module %s: it depends on %s, which the package lacks", file, dep)
			}
			if err := visit(dep); err != nil {
				return err
			}
		}
		order = append(order, file)
		return nil
	}
	for _, module := range wanted {
		if files[module] == "" {
			continue
		}
		if err := visit(module); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleName returns the name that the kernel knows a module file by.
func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(file), ".ko"), "-", "_")
}

// moduleDepends reads the depends= field of a module's .modinfo section.
func moduleDepends(ko []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			return strings.Split(strings.ReplaceAll(list, "-", "_"), ","), nil
		}
	}
	return nil, nil
}
