package compile_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/testdriver"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
)

const secret = "-----BEGIN PRIVATE KEY-----"

// attack compiles a driver that attacks the builder. It returns the log together with the error's text. If the builder
// needs more than a minute, it hangs, and the test fails.
func attack(t *testing.T, r compile.Request, cache *cas.Cache) (result *compile.Result, told string, err error) {
	t.Helper()
	var log bytes.Buffer
	r.Cache, r.WorkDir, r.Log = cache, t.TempDir(), &log
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	result, err = compile.Modules(ctx, r)
	told = log.String()
	if err != nil {
		told += err.Error() + fault.Hint(err)
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		t.Errorf("the builder hangs: %s", told)
	}
	return result, told, err
}

func newCache(t *testing.T) *cas.Cache {
	t.Helper()
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cache.Close() })
	return cache
}

// TestHostileFiles compiles drivers that put a link, a pipe or a folder in the place of a file that the builder reads
// after the sandbox. The builder must not open the host's file to which the link leads, and it must not hang.
func TestHostileFiles(t *testing.T) {
	t.Parallel()
	host := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(host, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	// The test puts each kind of file in each place. The name of the file is added to the command that makes it.
	links := map[string]string{"a link": "ln -s " + host, "a pipe": "mkfifo", "a folder": "mkdir",
		"a link to itself": "ln -s ."}
	places := map[string]func(kbuild, script, make string) (string, string){
		"an answer": func(kbuild, script, make string) (string, string) {
			return kbuild, strings.Replace(script, "        has_size)\n",
				"        has_size)\n            rm -f answer; "+make+" answer\n", 1)
		},
		"the guard's note": func(kbuild, script, make string) (string, string) {
			return kbuild, strings.Replace(script, "        has_size)\n",
				"        has_size)\n            rm -f /prebake/trouble/compiler; "+make+" /prebake/trouble/compiler\n", 1)
		},
		"the plan": func(kbuild, script, make string) (string, string) {
			return strings.Replace(kbuild, "\nmodules:",
				"\nX := $(shell test -d /prebake/plan && rm -f /prebake/plan/plan && "+make+" /prebake/plan/plan)\nmodules:",
				1), script
		},
		"a module": func(kbuild, script, make string) (string, string) {
			return kbuild + "\t@rm -f $@; " + make + " $@\n", script
		},
		"a second module": func(kbuild, script, make string) (string, string) {
			return kbuild + "\t@" + make + " other.ko\n", script
		},
		"a stripped module": func(kbuild, script, make string) (string, string) {
			return kbuild + "\t@" + make + " /prebake/out/nvidia.ko; mkdir -p /prebake/out/0; " + make +
				" /prebake/out/0/nvidia.ko; true\n", script
		},
		"an object": func(kbuild, script, make string) (string, string) {
			return kbuild + "\t@rm -f nvidia/nv.o; " + make + " nvidia/nv.o\n", script
		},
		"a command file": func(kbuild, script, make string) (string, string) {
			return kbuild + "\t@rm -f nvidia/.nv.o.cmd; " + make + " nvidia/.nv.o.cmd\n", script
		},
		"a source": func(kbuild, script, make string) (string, string) {
			return kbuild + "\t@rm -f nvidia/nv.c; " + make + " nvidia/nv.c\n", script
		},
		"the answers' folder": func(kbuild, script, make string) (string, string) {
			return kbuild + "\t@rm -rf conftest; " + make + " conftest\n", script
		},
	}
	for place, edit := range places {
		for kind, command := range links {
			if place == "the plan" && kind == "a pipe" {
				continue // `make` itself would wait for the pipe until the sandbox's time limit
			}
			t.Run(place+" is "+kind, func(t *testing.T) {
				t.Parallel()
				r := toyWithTests(t)
				kbuild, script := edit(testdriver.Kbuild, testdriver.Script, command)
				if kbuild+script == testdriver.Kbuild+testdriver.Script {
					t.Fatal("the row changes nothing")
				}
				write(t, r.Source, map[string]string{"Kbuild": kbuild, "conftest.sh": script})
				result, told, err := attack(t, r, newCache(t))
				if strings.Contains(told, secret) {
					t.Errorf("the output contains the host's file:\n%s", told)
				}
				for name, path := range result.Modules {
					if text, err := os.ReadFile(path); err != nil || bytes.Contains(text, []byte(secret)) {
						t.Errorf("module %s: %v, or it holds the host's file", name, err)
					}
				}
				if err == nil && place == "a module" {
					t.Error("Modules succeeded without a module")
				}
				if text, err := os.ReadFile(host); err != nil || string(text) != secret {
					t.Errorf("the host's file is now %q, %v", text, err)
				}
				if info, err := os.Stat(host); err != nil || info.Mode().Perm() != 0o600 {
					t.Errorf("the host's file has mode %v, %v", info.Mode(), err)
				}
			})
		}
	}
}

// TestHostileAnswers checks that a conftest test of a hostile driver cannot change the stored answers of another driver
// or another test.
func TestHostileAnswers(t *testing.T) {
	t.Parallel()
	r := toyWithTests(t)
	want, _ := compileModule(t, r)
	cache := newCache(t)
	bad := toyWithTests(t)
	bad.Headers, bad.Toolchain = r.Headers, r.Toolchain
	poison := `        has_old)
            for dir in . .. /prebake/plan /prebake/src /prebake/guard /prebake/trouble /tmp; do
                for name in has_size tests/has_size answer conftest/headers.h conftest.sh; do
                    echo "#define NV_HAS_SIZE_NOT" > $dir/$name
                done
                echo 'exit 1' > $dir/x86_64-cros-linux-gnu-gcc
            done 2>/dev/null
`
	write(t, bad.Source, map[string]string{"conftest.sh": strings.Replace(testdriver.Script, "        has_old)\n", poison,
		1)})
	bad.SourceDigest = "a hostile driver"
	if _, told, err := attack(t, bad, cache); err != nil {
		t.Logf("the hostile driver fails: %s", told)
	}
	r.Cache = cache
	if got, notes := compileModule(t, r); !bytes.Equal(got, want) {
		t.Errorf("the hostile driver changed the module of another driver (%s)", notes)
	}
}

// TestHostileObjects has a driver whose makefile compiles another file into the object of a source. Another driver with
// the same source must not get this object from the cache.
func TestHostileObjects(t *testing.T) {
	t.Parallel()
	r := toyWithTests(t)
	want, _ := compileModule(t, r)
	cache := newCache(t)
	bad := toyWithTests(t)
	bad.Headers, bad.Toolchain = r.Headers, r.Toolchain
	write(t, bad.Source, map[string]string{"Kbuild": testdriver.Kbuild +
		"\t@echo 'int nv(void *h) { return 666; }' > /tmp/x.c; $(CC) -c -o nvidia/nv.o /tmp/x.c\n"})
	bad.SourceDigest = "a hostile driver"
	if _, told, err := attack(t, bad, cache); err != nil {
		t.Fatal(told)
	}
	r.Cache = cache
	if got, notes := compileModule(t, r); !bytes.Equal(got, want) {
		t.Errorf("the hostile driver changed the module of another driver (%s)", notes)
	}
}

// TestHiddenFileInObject has a source that puts utsrelease.h into its object. Stored objects do not depend on this
// header, because it differs between sibling kernels (see view.go). So the cache must not keep this object: it is
// compiled again each time.
func TestHiddenFileInObject(t *testing.T) {
	t.Parallel()
	r := toyWithTests(t)
	write(t, r.Source, map[string]string{"nvidia/nv.c": "#include <linux/here.h>\nasm(\".section .rodata\\n.incbin " +
		"\\\"/prebake/kernel/include/generated/utsrelease.h\\\"\\n.previous\");\n"})
	cache := newCache(t)
	for _, release := range []string{"6.1.0-55", "6.1.0-56"} {
		headers(t, r.Headers, release, "0x11111111")
		r.HeaderDigest = "headers " + release
		plain, cached := r, r
		want, _ := compileModule(t, plain)
		cached.Cache = cache
		for range 2 {
			got, notes := compileModule(t, cached)
			if !bytes.Equal(got, want) {
				t.Errorf("%s: another module than make's (%s)", release, notes)
			}
			if !strings.HasSuffix(notes, "; 2 files") {
				t.Errorf("%s: the phases say %q; want both files compiled again", release, notes)
			}
		}
	}
}

// TestChecksFirst checks that the driver's sanity checks run before its conftest tests, so a build for an unsupported
// kernel fails at once.
func TestChecksFirst(t *testing.T) {
	t.Parallel()
	r := toyWithTests(t)
	write(t, r.Source, map[string]string{
		"Kbuild": strings.Replace(testdriver.Kbuild, "BUILD_SANITY_CHECKS = cc_sanity_check",
			"BUILD_SANITY_CHECKS = cc_sanity_check preempt_rt_sanity_check", 1),
		"conftest.sh": strings.Replace(testdriver.Script, "    cc_sanity_check)",
			"    preempt_rt_sanity_check)\n        echo 'The kernel you are installing for is a PREEMPT_RT kernel!'\n        "+
				"exit 1\n    ;;\n    cc_sanity_check)", 1),
	})
	_, told, err := attack(t, r, newCache(t))
	if fault.Of(err) != fault.Unsupported || strings.Contains(told, "CONFTEST") || !strings.Contains(told, "PREEMPT_RT") {
		t.Errorf("Modules = %v (%v); want %v before the first question\n%s", err, fault.Of(err), fault.Unsupported, told)
	}
}
