package modcheck

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/prebake/prebake/builder/internal/btf"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
)

// checkTypes compares the BTF of every module with the kernel's BTF. With BTF that was made for another kernel, this
// kernel refuses the module or ignores the BTF, or tracers show wrong results.
func (k Kernel) checkTypes(modules map[string]string) error {
	if k.BTF == "" && k.Fingerprint == "" {
		return nil // Google signed the modules as they are, and Prebake has no BTF of the kernel to compare with
	}
	var kernel *btf.Types
	if k.BTF != "" {
		data, err := os.ReadFile(k.BTF)
		if err == nil {
			kernel, err = btf.Parse(data)
		}
		if err != nil {
			return fmt.Errorf("read the kernel's BTF: %w", err)
		}
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		if err := fits(modules[name], kernel); err != nil {
			errs = append(errs, &modinfo.Problem{Module: name, Text: err.Error()})
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return fault.Wrap(fault.CheckFailed, errors.Join(errs...),
		"compile the modules again, with the headers of this kernel")
}

func fits(path string, kernel *btf.Types) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() // the file is only read, so an error of Close loses nothing
	types, err := btf.Read(f)
	switch {
	case kernel == nil && errors.Is(err, btf.ErrNone):
		return nil
	case err != nil:
		return fmt.Errorf("read the module's BTF: %w", err)
	case kernel == nil:
		return errors.New("the module has BTF, but the kernel's BTF is missing, so the types cannot be compared")
	}
	if err := kernel.Check(types); err != nil {
		return fmt.Errorf("the module's types do not continue the kernel's types: %w", err)
	}
	return nil
}
