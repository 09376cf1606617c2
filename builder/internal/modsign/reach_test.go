package modsign_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

// TestKeyIsOutOfReach compiles a driver whose makefile searches for the signing key. The makefile knows the key's path.
// It searches the file system and the environment of every process that it sees, and must not find the key.
func TestKeyIsOutOfReach(t *testing.T) {
	installed.Programs(t, "bwrap", "make", "gcc", "strip")
	const secret = "the-secret-of-the-key"
	dir := t.TempDir()
	key := write(t, filepath.Join(dir, "prebake-module.key"), []byte(secret))
	t.Setenv("PREBAKE_MODULE_KEY", key)
	t.Setenv("VAULT_TOKEN", secret)
	search := "cat " + key + "; env; cat /proc/self/environ /proc/*/environ /proc/*/cmdline; find / -xdev -name " +
		"prebake-module.key -exec cat {} +; " +
		"for p in /proc/[0-9]*; do cat $p/root" + key + "; done; echo searched"
	for name, text := range map[string]string{
		"headers/.config":  "CONFIG_MODVERSIONS=y\n# CONFIG_LD_IS_LLD is not set\n",
		"headers/Makefile": "modules:\n\t@true\n",
		"source/Makefile":  "modules:\n\t@(" + strings.ReplaceAll(search, "$", "$$") + ") 2>&1 | tr '\\0' '\\n'\n",
		"source/Kbuild":    "X = y\n", "source/nvidia/nv.Kbuild": "obj-m += nvidia.o\n", "source/nvidia/nv.c": "int x;\n",
		"toolchain/bin/placeholder": "",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, path, []byte(text))
	}
	for _, tool := range []string{"gcc", "strip"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(path, filepath.Join(dir, "toolchain/bin/x86_64-cros-linux-gnu-"+tool)); err != nil {
			t.Fatal(err)
		}
	}
	// Outside the sandbox, the same search must find the key. Otherwise this test would prove nothing.
	if out, _ := exec.CommandContext(t.Context(), "sh", "-c",
		strings.Replace(search, "find / ", "find "+dir+" ", 1)).CombinedOutput(); !bytes.Contains(out, []byte(secret)) {
		t.Fatalf("the search finds nothing outside of the sandbox either: %s", out)
	}
	var log bytes.Buffer
	_, err := compile.Modules(t.Context(), compile.Request{
		Source: filepath.Join(dir, "source"), Headers: filepath.Join(dir, "headers"),
		Toolchain: filepath.Join(dir, "toolchain"),
		Env:       map[string]string{"CC": "x86_64-cros-linux-gnu-gcc"}, Release: "6.1.0",
		Driver: target.Driver{Version: "535.261.03", Flavour: target.Open},
		Arch:   target.AMD64, WorkDir: t.TempDir(), Log: &log,
	})
	// The makefile builds no module, so Modules returns an error. Only the output counts.
	if !strings.Contains(log.String(), "searched") {
		t.Fatalf("compile.Modules = %v; the makefile did not run: %s", err, log.String())
	}
	if strings.Contains(log.String(), secret) || strings.Contains(log.String(), "PREBAKE_MODULE_KEY") {
		t.Errorf("the makefile found the key: %s", log.String())
	}
}
