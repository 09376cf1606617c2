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

// drm connects a GPU to the kernel's graphics subsystem (DRM). For a kernel without DRM, the module is empty.
const drm = "nvidia-drm"

// peermem shares GPU memory with RDMA cards. If it was compiled without the RDMA stack of the cards' vendor, the kernel
// links it, but its own start code returns EINVAL.
const peermem = "nvidia-peermem"

// loadOrder is the order in which a node loads the modules. peermem is last, because most nodes do not need it.
var loadOrder = []string{"nvidia", "nvidia-uvm", "nvidia-modeset", drm, peermem}

// ErrLacking means that the module nvidia needs modules of the kernel that the machine lacks. A machine that boots
// vmlinux alone has no modules.
var ErrLacking = errors.New("the test machine lacks the kernel's own modules")

// normalise returns a copy of the map in which each module's name is spelled as in NVIDIA's file names, but without
// .ko.
func normalise(modules map[string]string) map[string]string {
	out := make(map[string]string, len(modules))
	for name, path := range modules {
		out[plainName(name)] = path
	}
	return out
}

// plainName returns a module's name as in NVIDIA's file names: without .ko, and with - in place of _.
func plainName(name string) string {
	return strings.ReplaceAll(strings.TrimSuffix(name, ".ko"), "_", "-")
}

// choose returns the driver's modules that can be loaded, in load order. The second result has the reason for each
// other module. The map present has the kernel's modules that the machine loads at boot. depends returns the names of
// the modules that the module in a file needs.
//
// If the module nvidia itself cannot be loaded, the error wraps ErrLacking.
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

// kernelModules returns the kernel's modules that the machine loads at boot. The boot folder lists them in
// modules/order, which may be missing.
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
