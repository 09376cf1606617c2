package mirror

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/ulikunitz/xz"
)

// maxModule is the largest permitted size of a module of the kernel, in bytes. Real modules are far smaller.
const maxModule = 64 << 20

// moduleFile reports whether a file is a kernel module. The modules of Debian's newer kernels are compressed.
func moduleFile(name string) bool {
	return path.Ext(strings.TrimSuffix(name, ".xz")) == ".ko"
}

// decompress decompresses a module that is compressed with xz. It does not change the module's name in the tree.
func (t tree) decompress(file string) error {
	if path.Ext(file) != ".xz" {
		return nil
	}
	n := t[file]
	r, err := xz.NewReader(bytes.NewReader(n.data))
	if err != nil {
		return err
	}
	if n.data, err = io.ReadAll(io.LimitReader(r, maxModule+1)); err != nil {
		return err
	}
	if len(n.data) > maxModule {
		return fmt.Errorf("the decompressed module has more than %d bytes", maxModule)
	}
	t[file] = n
	return nil
}

// loadOrder decompresses the wanted modules and their dependencies, and returns their files in load order. It leaves
// out a wanted module without a file, which is built into the kernel. A missing dependency is an error.
func loadOrder(t tree, wanted ...string) ([]string, error) {
	files := map[string]string{}
	for name := range t {
		if moduleFile(name) {
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
			return fmt.Errorf("read module %s: the module depends on itself", file)
		}
		open[module] = true
		if err := t.decompress(file); err != nil {
			return fmt.Errorf("read module %s: %w", file, err)
		}
		deps, err := moduleDepends(t[file].data)
		if err != nil {
			return fmt.Errorf("read module %s: %w", file, err)
		}
		for _, dep := range deps {
			if files[dep] == "" {
				return fmt.Errorf("read module %s: the module depends on %s, which the package lacks", file, dep)
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

// moduleName returns the kernel's name for the module in a file: without suffixes, and with _ for -.
func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(strings.TrimSuffix(file, ".xz")), ".ko"), "-", "_")
}

// moduleDepends reads the depends= field of a module's .modinfo section.
func moduleDepends(ko []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("the module has no section .modinfo")
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
