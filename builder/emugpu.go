package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm/emugpu"
)

// emuGPURevision changes with the emulated GPU's source and the way of
// compiling it.
func emuGPURevision() (string, error) {
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

// compileEmuGPU returns a compiler of the emulated GPU that works below dir.
func compileEmuGPU(dir string) func(ctx context.Context, arch target.Arch, headers, toolchain string, env map[string]string, release string) (string, error) {
	return func(ctx context.Context, arch target.Arch, headers, toolchain string, env map[string]string, release string) (string, error) {
		work, err := os.MkdirTemp(dir, "emugpu-")
		if err != nil {
			return "", err
		}
		source, out := filepath.Join(work, "source"), filepath.Join(work, "work")
		for _, d := range []string{source, out} {
			if err := os.Mkdir(d, 0o755); err != nil {
				return "", err
			}
		}
		if err := emugpu.WriteTo(source); err != nil {
			return "", err
		}
		res, err := compile.External(ctx, compile.Request{
			Source: source, Headers: headers, Toolchain: toolchain, Env: env, Release: release, Arch: arch, WorkDir: out,
		})
		if err != nil {
			return "", fmt.Errorf("compile %s: %w", emugpu.Name, err)
		}
		path, ok := res.Modules[emugpu.Name]
		if !ok {
			return "", fmt.Errorf("compile %s: no module came out", emugpu.Name)
		}
		return path, nil
	}
}
