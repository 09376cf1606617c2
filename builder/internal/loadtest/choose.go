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

// peermem is the module that shares GPU memory with RDMA cards. If it was compiled for a kernel without the vendor's
// RDMA stack, it links into the kernel, but its load returns EINVAL.
const peermem = "nvidia-peermem"

// loadOrder is the order in which a node loads the modules. The last one is the module that most nodes do not need.
var loadOrder = []string{"nvidia", "nvidia-uvm", "nvidia-modeset", drm, peermem}

// ErrLacking means that the machine lacks modules of the kernel that nvidia needs. A machine that boots from vmlinux
// alone has only the drivers that are built into the kernel.
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

// choose returns the modules that can be loaded, in order. skipped has each other module and the reason why it is not
// loaded. present has the modules that the machine has at boot. depends returns the modules that a file needs.
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
			"put a boot archive whose modules/order has these modules into the bucket, or skip the load test: --load-test off")
	}
	return order, skipped, nil
}

// kernelModules returns the names of the modules that the machine loads at boot.
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

// dependencies returns the names of the modules that a file needs.
func dependencies(file string) ([]string, error) {
	m, err := readModule(file)
	if err != nil {
		return nil, err
	}
	return m.Depends, nil
}
