package compile_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/pkg/cas"
)

// kernelMakefile tests compiler flags in the way of the kernel's scripts/Makefile.compiler (TMPOUT, try-run and
// cc-option of Linux 6.1), and prints the flags that passed.
const kernelMakefile = `TMPOUT = $(if $(M),$(firstword $(M))/).tmp_$$$$
try-run = $(shell set -e; TMP=$(TMPOUT)/tmp; trap "rm -rf $(TMPOUT)" EXIT; mkdir -p $(TMPOUT); if ($(1)) >/dev/null 2>&1; then echo "$(2)"; else echo "$(3)"; fi)
cc-option = $(call try-run,$(CC) -Werror $(FLAGS) $(1) -c -x c /dev/null -o "$$TMP",$(1),-DNO)
FLAGS := -O2
FLAGS += $(call cc-option,-Wall)
FLAGS += $(call cc-option,-Wno-such-flag -Wsuch-flag)
FLAGS += $(call cc-option,-DX="a  b")
tested := $(FLAGS)
modules: ; @echo "TESTED $(tested)"
`

// TestFlagTests checks that a build with a cache tests the kernel's flags in a sandbox without the driver, stores the
// compiler's answers, and uses them in later builds. The driver must not be able to change a stored answer.
func TestFlagTests(t *testing.T) {
	t.Parallel()
	r := toyWithTests(t)
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Fatal(err)
	}
	compiler := filepath.Join(r.Toolchain, "bin/x86_64-cros-linux-gnu-gcc")
	if err := os.Remove(compiler); err != nil {
		t.Fatal(err)
	}
	// This compiler fails every flag test in a sandbox that has the driver's files.
	write(t, r.Toolchain, map[string]string{"bin/x86_64-cros-linux-gnu-gcc": "#!/bin/sh\ncase \"$*\" in */dev/null*) [ " +
		"! -e /prebake/src/conftest.sh ] || exit 1 ;; esac\nexec " + gcc + " \"$@\"\n"})
	if err := os.Chmod(compiler, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, r.Headers, map[string]string{"Makefile": kernelMakefile})
	kbuild, err := os.ReadFile(filepath.Join(r.Source, "Kbuild"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, r.Source, map[string]string{"Kbuild": string(kbuild) +
		"\t@$(MAKE) --no-print-directory -f $(NV_KERNEL_SOURCES)/Makefile M=$(CURDIR) CC=$(CC) modules\n\t@touch " +
		"/prebake/flag-tests/x 2>/dev/null || test -e /prebake/flag-tests-new || echo CLOSED\n"})
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cache.Close() })
	said := func(c *cas.Cache) string {
		t.Helper()
		var log bytes.Buffer
		run := r
		run.Cache, run.WorkDir, run.Log = c, t.TempDir(), &log
		if _, err := compile.Modules(t.Context(), run); err != nil {
			t.Fatalf("Modules = %v\n%s", err, &log)
		}
		for line := range strings.Lines(log.String()) {
			if strings.HasPrefix(line, "TESTED") {
				if c != nil && !strings.Contains(log.String(), "CLOSED") {
					t.Errorf("the driver can write to the answers, or to new ones:\n%s", &log)
				}
				return strings.TrimSpace(line)
			}
		}
		t.Fatalf("no flags in\n%s", &log)
		return ""
	}
	if got, want := said(nil), "TESTED -O2 -DNO -DNO -DNO"; got != want {
		t.Fatalf("without a cache: %q; want the compiler's own word %q", got, want)
	}
	for _, what := range []string{"first", "again"} {
		if got, want := said(cache), "TESTED -O2 -Wall -DNO -DX=a b"; got != want {
			t.Errorf("%s, with a cache: %q; want what the compiler said without the driver, %q", what, got, want)
		}
	}
}
