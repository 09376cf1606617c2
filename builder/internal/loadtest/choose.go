package loadtest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/vm"
)

// drm is the module that connects a GPU to the kernel's graphics subsystem (DRM). For a kernel without DRM, the
// compiled module is empty.
const drm = "nvidia-drm"

// peermem is the module that shares GPU memory with RDMA cards. If the module was compiled without the RDMA stack of
// the cards' vendor, the kernel links the module, but the module's own start code then returns EINVAL.
const peermem = "nvidia-peermem"

// loadOrder is the order in which a node loads the modules. peermem is the last one, because most nodes do not need it.
var loadOrder = []string{"nvidia", "nvidia-uvm", "nvidia-modeset", drm, peermem}

// ErrLacking means that the module nvidia needs some of the kernel's own modules, and the machine lacks them. A machine
// that boots vmlinux alone has only the parts that are built into the kernel, and no modules.
var ErrLacking = errors.New("the test machine lacks the kernel's own modules")

// normalise maps module names to NVIDIA's spelling. Callers may write a name with or without .ko, and with - or _.
func normalise(modules map[string]string) map[string]string {
	out := make(map[string]string, len(modules))
	for name, path := range modules {
		out[plainName(name)] = path
	}
	return out
}

// plainName returns a module's name in the spelling of NVIDIA's file names.
func plainName(name string) string {
	return strings.ReplaceAll(strings.TrimSuffix(name, ".ko"), "_", "-")
}

// choose returns the driver's modules that can be loaded, in load order. The argument modules maps the names of the
// driver's modules to files. The map present has the names of the kernel's own modules that the machine loads at boot.
// The function depends returns the names of the modules that the module in a file needs. The result skipped maps each
// other module of the driver to the reason why the test does not load it. If the module nvidia itself cannot be loaded,
// the error wraps ErrLacking.
func choose(modules map[string]string, present map[string]bool,
	depends func(file string) ([]string, error)) (order []string, skipped map[string]string, err error) {
	skipped = map[string]string{}
	for name := range modules {
		if !slices.Contains(loadOrder, name) {
			skipped[name] = "is not among the modules that nodes load"
		}
	}
	for _, name := range loadOrder {
		file := modules[name]
		if file == "" {
			continue
		}
		needs, err := depends(file)
		if err != nil {
			return nil, nil, fmt.Errorf("read %s: %w", filepath.Base(file), err)
		}
		var missing []string
		for _, need := range needs {
			need = plainName(need)
			if why := skipped[need]; why != "" {
				missing = append(missing, need+", which "+why)
			} else if !present[need] && !slices.Contains(order, need) {
				missing = append(missing, need+", which the machine does not have")
			}
		}
		if len(missing) == 0 {
			order = append(order, name)
			continue
		}
		skipped[name] = "needs " + strings.Join(missing, "; ")
	}
	if why, ok := skipped["nvidia"]; ok {
		return nil, nil, fault.Wrap(fault.InputMissing, fmt.Errorf("%w: nvidia %s", ErrLacking, why),
			"put a prebake-boot.tgz into the bucket, with these modules and with a file modules/order that lists them; or "+
				"build without a load test: --load-test off")
	}
	return order, skipped, nil
}

// kernelModules returns the names of the kernel's own modules that the machine loads at boot. boot is the boot folder,
// in which the file modules/order lists them. Without this file, kernelModules returns an empty map.
func kernelModules(boot string) (map[string]bool, error) {
	present := map[string]bool{}
	text, err := os.ReadFile(filepath.Join(boot, filepath.FromSlash(vm.BootOrder)))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, file := range strings.Fields(string(text)) {
		present[plainName(file)] = true
	}
	return present, nil
}

// dependencies returns the names of the modules that the module in a file needs.
func dependencies(file string) ([]string, error) {
	m, err := readModule(file)
	if err != nil {
		return nil, err
	}
	return m.Depends, nil
}
