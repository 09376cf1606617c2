package emugpu

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/pkg/target"
)

func TestWriteTo(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := WriteTo(dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"Kbuild", "emugpu.c"} {
		want, err := fs.ReadFile(Sources(), name)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v; want the embedded %d", name, len(got), err, len(want))
		}
		if !bytes.Contains(want, []byte("SPDX-License-Identifier: GPL-2.0-only")) {
			t.Errorf("%s carries no licence", name)
		}
	}
	if err := WriteTo(dir); err == nil {
		t.Error("WriteTo() over its own files = nil; want an error")
	}
}

// TestKernelArg checks that KernelArg returns the kernel argument for which the module's source looks.
func TestKernelArg(t *testing.T) {
	t.Parallel()
	text, err := fs.ReadFile(Sources(), "emugpu.c")
	if err != nil {
		t.Fatal(err)
	}
	for _, arch := range []target.Arch{target.AMD64, target.ARM64} {
		if want := `BOOT_WITH	"` + KernelArg(arch) + `"`; !bytes.Contains(text, []byte(want)) {
			t.Errorf("emugpu.c has no %s", want)
		}
	}
}
