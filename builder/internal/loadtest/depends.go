package loadtest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/vm"
)

// kernelModules returns the names of the modules that the machine loads while
// it boots.
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

// plainName returns a module's name in the spelling that NVIDIA's files have.
func plainName(name string) string {
	return strings.ReplaceAll(strings.TrimSuffix(name, ".ko"), "_", "-")
}

// missingDependencies returns the modules that a file needs and that are not
// present.
func missingDependencies(file string, present map[string]bool) (missing []string, err error) {
	in, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	st, err := in.Stat()
	if err != nil {
		return nil, err
	}
	m, err := modinfo.Read(in, st.Size())
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", filepath.Base(file), err)
	}
	for _, name := range m.Depends {
		if !present[plainName(name)] {
			missing = append(missing, name)
		}
	}
	return missing, nil
}
