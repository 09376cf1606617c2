// Package testgpu compiles the emulated GPU (pkg/vm/emugpu) for one kernel, in the driver's sandbox and with its
// toolchain. It never runs the emulated GPU; the load test does. Despite its name, this is production code: the
// builder's load test puts the emulated GPU into each virtual machine.
package testgpu

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/pkg/vm/emugpu"
)

// Revision returns a hash over the emulated GPU's source and compile.Recipe, for cache keys.
func Revision() (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, compile.Recipe)
	err := fs.WalkDir(emugpu.Sources(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := fs.ReadFile(emugpu.Sources(), name)
		fmt.Fprintf(h, "%s %d\n%s", name, len(text), text)
		return err
	})
	return hex.EncodeToString(h.Sum(nil))[:16], err
}

// Compile compiles the emulated GPU below a folder and returns the module's path. It sets Source and WorkDir of the
// request. The caller sets the rest.
func Compile(ctx context.Context, dir string, r compile.Request) (string, error) {
	work, err := os.MkdirTemp(dir, "emugpu-")
	if err != nil {
		return "", err
	}
	r.Source, r.WorkDir = filepath.Join(work, "source"), filepath.Join(work, "work")
	for _, d := range []string{r.Source, r.WorkDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return "", err
		}
	}
	if err := emugpu.WriteTo(r.Source); err != nil {
		return "", err
	}
	res, err := compile.External(ctx, r)
	if err != nil {
		return "", fmt.Errorf("compile %s: %w", emugpu.Name, err)
	}
	path, ok := res.Modules[emugpu.Name]
	if !ok {
		return "", fmt.Errorf("compile %s: the compile made no module of this name", emugpu.Name)
	}
	return path, nil
}
