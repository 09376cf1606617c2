package pipeline_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/testdriver"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
)

// putTestDriver writes a driver whose conftest.sh compiles test programs, and a kernel with the headers for them. In
// one file of the driver it replaces the text from by the text to.
func (f *farm) putTestDriver(t *testing.T, file, from, to string) {
	t.Helper()
	files := map[string]string{}
	for name, text := range testdriver.Sources() {
		if name == file {
			if !strings.Contains(text, from) {
				t.Fatalf("%s has no %q", name, from)
			}
			text = strings.Replace(text, from, to, 1)
		}
		files["kernel-open/"+name] = text
	}
	f.driver(t, files)
	tree := map[string]string{headers + "include/config/kernel.release": "6.1.0-9-test\n"}
	for name, text := range testdriver.Headers("6.1.0-9-test", "0x11111111") {
		tree[headers+name] = text
	}
	f.kernel(t, "17800.0.9", tree)
}

// TestHostileDriver compiles drivers that attack the builder from inside the sandbox. A driver must not reach the
// signing key or the published log, make the builder hang, or leave results for later builds. If the driver kills the
// compiler, the error must have a class that says so.
func TestHostileDriver(t *testing.T) {
	t.Parallel()
	const question = "        has_size)\n"
	for name, row := range map[string]struct {
		file, from, to string
		kind           fault.Kind // -1 allows any outcome
	}{
		"a link to the key for an answer": {"conftest.sh", question,
			question + "            rm -f answer; ln -s @KEY@ answer\n", -1},
		"a pipe for an answer": {"conftest.sh", question, question + "            rm -f answer; mkfifo answer\n",
			-1},
		"a link to the key for a module": {"Kbuild", "\t@echo \"  LD [M]  $@\"",
			"\t@rm -f $@; ln -s @KEY@ $@; echo @KEY@ > /dev/null; exit 0; echo \"  LD [M]  $@\"", -1},
		"another answer for everybody": {"conftest.sh", question,
			question + "            for d in . .. /prebake /tmp; do echo poison > $d/answer; done 2>/dev/null\n", -1},
		"a killed compiler": {"conftest.sh", "    echo \"$1\" > conftest$$.c\n",
			"    echo \"$1\" > conftest$$.c\n    CC=\"$CC -wrapper /prebake/src/killed\"; printf '#!/bin/sh\\nkill -9 $$\\n' " +
				"> killed; chmod +x killed\n", fault.OutOfMemory},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFarm(t)
			key, err := os.ReadFile(f.key)
			if err != nil {
				t.Fatal(err)
			}
			secret := strings.Split(string(key), "\n")[1]
			f.putTestDriver(t, row.file, strings.ReplaceAll(row.from, "@KEY@", f.key),
				strings.ReplaceAll(row.to, "@KEY@", f.key))
			cache := emptyCache(t)
			var log strings.Builder
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			res, err := pipeline.Run(ctx, f.config(t, cache), request("17800.0.9"), &log, &timeline.Run{})
			if ctx.Err() != nil {
				t.Fatalf("the builder hangs: %v\n%s", err, &log)
			}
			if !slices.Contains(phases(res), "compile") {
				t.Fatalf("the build ended before the compile: %v", err)
			}
			if row.kind >= 0 && fault.Of(err) != row.kind {
				t.Errorf("Run = %v (%v); want %v\n%s", err, fault.Of(err), row.kind, &log)
			}
			told := log.String()
			if err != nil {
				told += err.Error() + fault.Hint(err)
			}
			if strings.Contains(told, secret) {
				t.Errorf("the log or the error has the signing key:\n%s", told)
			}
			if now, err := os.ReadFile(f.key); err != nil || string(now) != string(key) {
				t.Errorf("the key's file changed: %v", err)
			}
			if row.kind >= 0 {
				if kept, err := filepath.Glob(filepath.Join(cache.Dir(), "facts", "conftest-2", "*")); err != nil || len(kept) > 0 {
					t.Errorf("the conftest cache kept answers of this driver: %v, %v", kept, err)
				}
			}
		})
	}
}
