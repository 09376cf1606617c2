// Package testgpu compiles the emulated GPU (pkg/vm/emugpu) for one kernel. The package uses the sandbox and the
// toolchain with which the driver is compiled. The package refuses to run the emulated GPU, because the load test does
// that.
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

// Revision returns a hash over the emulated GPU's source and over compile.Recipe, the version number of the build
// method. Cache keys contain this hash. So if the source or the build method changes, the module is compiled again.
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

// Compile compiles the emulated GPU below dir and returns the module's path. Compile sets Source and WorkDir of the
// request. The caller sets the kernel, its headers and the toolchain.
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
