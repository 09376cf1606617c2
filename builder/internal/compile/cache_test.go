package compile_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/testdriver"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/program"
)

// toyWithTests returns toy's request with another driver: its makefiles and its conftest.sh have the formats of
// NVIDIA's, with a few conftest tests (see package testdriver).
func toyWithTests(t *testing.T) compile.Request {
	t.Helper()
	r := toy(t)
	if err := os.Symlink("/usr/bin/ld", filepath.Join(r.Toolchain, "bin/x86_64-cros-linux-gnu-ld")); err != nil {
		t.Fatal(err)
	}
	write(t, r.Source, testdriver.Sources())
	headers(t, r.Headers, "6.1.0-55", "0x11111111")
	r.HeaderDigest, r.ToolchainDigest, r.SourceDigest, r.HostDigest = "headers 55", "toolchain", "source", "host"
	return r
}

func headers(t *testing.T, dir, release, crc string) {
	t.Helper()
	write(t, dir, testdriver.Headers(release, crc))
}

// compileModule compiles the driver. It returns the bytes of nvidia.ko, and how much the phases conftest and compile
// reused, such as "6 tests, 6 remembered; 3 files, 2 reused".
func compileModule(t *testing.T, r compile.Request) ([]byte, string) {
	t.Helper()
	var log bytes.Buffer
	r.WorkDir, r.Log = t.TempDir(), &log
	result, err := compile.Modules(t.Context(), r)
	if err != nil {
		t.Fatalf("Modules = %v\n%s", err, &log)
	}
	data, err := os.ReadFile(result.Modules["nvidia"])
	if err != nil {
		t.Fatal(err)
	}
	var notes []string
	for _, p := range result.Phases {
		if p.Name == "conftest" || p.Name == "compile" {
			notes = append(notes, p.Note)
		}
	}
	if strings.Contains(log.String(), "prebake: ") {
		t.Errorf("the log has a complaint:\n%s", &log)
	}
	return data, strings.Join(notes, "; ")
}

// TestCacheHiddenHeader adds a file to the next release of a driver. If the compiler finds the new file before a header
// that a stored object was made from, the cache must not return the object, although that header is unchanged.
func TestCacheHiddenHeader(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name   string
		source string // content of nvidia/user.c, which includes the first release's common.h
		adds   map[string]string
		notes  string // what compileModule returns for the second release
	}{
		{"no new file", `#include "common.h"`, nil, "6 tests, 6 remembered; 3 files, 2 reused"},
		{"another name", `#include "common.h"`, map[string]string{"nvidia/uncommon.h": "#define COMMON 2\n"},
			"6 tests, 6 remembered; 3 files, 2 reused"},
		{"beside the source", `#include "common.h"`, map[string]string{"nvidia/common.h": "#define COMMON 2\n"},
			"6 tests, 6 remembered; 3 files, 1 reused"},
		{"in a folder named as one of the kernel's headers", `#include "common.h"`,
			map[string]string{"nvidia/linux/other.h": ""}, "6 tests, 6 remembered; 3 files"},
		// NVIDIA's sources include no answer to a single question. The key does not cover such files.
		{"the answer to one question", "#include \"conftest/compile-tests/has_old.h\"\n#include \"common.h\"", nil,
			"6 tests, 6 remembered; 3 files, 1 reused"},
		// 535.274.02 asks one question more than 535.261.03, in the same way.
		{"one more question", `#include "common.h"`,
			map[string]string{"Kbuild": strings.Replace(testdriver.Kbuild, "NV_CONFTEST_TYPE_COMPILE_TESTS += has_old",
				"NV_CONFTEST_TYPE_COMPILE_TESTS += symbol_b\nNV_CONFTEST_TYPE_COMPILE_TESTS += has_old", 1)},
			"7 tests, 6 remembered; 3 files, 2 reused"},
		{"asked for", "#if __has_include(\"more.h\")\n#define COMMON 2\n#else\n#include \"common.h\"\n#endif",
			map[string]string{"nvidia/more.h": ""}, "6 tests, 6 remembered; 3 files, 1 reused"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r := toyWithTests(t)
			cache, err := cas.Open(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = cache.Close() })
			write(t, r.Source, map[string]string{"common.h": "#define COMMON 1\n",
				"nvidia/user.c": row.source + "\nint common = COMMON;\n"})
			r.Cache = cache
			compileModule(t, r)
			write(t, r.Source, row.adds)
			r.SourceDigest = "next source"
			got, notes := compileModule(t, r)
			r.Cache = nil
			want, _ := compileModule(t, r)
			if !bytes.Equal(got, want) {
				t.Error("the module is not what make alone makes")
			}
			if notes != row.notes {
				t.Errorf("the phases say %q; want %q", notes, row.notes)
			}
		})
	}
}

// TestCache checks that a build with a cache makes the same module as a build without one, and that it uses the stored
// results of all inputs that did not change.
func TestCache(t *testing.T) {
	t.Parallel()
	r := toyWithTests(t)
	dir := t.TempDir()
	cache, err := cas.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cache.Close() })
	step := func(what, notes string) {
		t.Helper()
		plain := r
		plain.Cache, plain.Debug = nil, true
		want, _ := compileModule(t, plain)
		cached := r
		cached.Cache = cache
		got, said := compileModule(t, cached)
		if !bytes.Equal(got, want) {
			t.Errorf("%s: the module is not what make alone makes", what)
		}
		if said != notes {
			t.Errorf("%s: the phases say %q; want %q", what, said, notes)
		}
	}
	step("empty cache", "6 tests; 2 files")
	// Both source files include the kernel's release. Only version.c uses the release, so only its object is never stored.
	const all, none = "6 tests, 6 remembered; 2 files, 1 reused", "6 tests; 2 files"
	step("the same again", all)
	headers(t, r.Headers, "6.1.0-56", "0x22222222")
	r.HeaderDigest = "headers 56"
	step("sibling kernel", all)

	write(t, r.Source, map[string]string{"nvidia/nv.c": "#include \"conftest/types.h\"\nint other = NV_symbol_a;\n"})
	r.SourceDigest = "next source"
	step("next driver", "6 tests, 6 remembered; 2 files")
	write(t, r.Source, map[string]string{"conftest.sh": strings.Replace(testdriver.Script, "return h->size",
		"return h->length", 1)})
	r.SourceDigest = "third source"
	// The changed test decides a macro that nv.c does not contain, so the object of nv.c is reused.
	step("driver with one other question", "6 tests, 5 remembered; 2 files, 1 reused")

	write(t, r.Headers, map[string]string{"Module.symvers": "0x22222222\tb\tvmlinux\tEXPORT_SYMBOL\t\n"})
	r.HeaderDigest = "headers 57"
	step("kernel with other symbols", none)
	write(t, r.Headers, map[string]string{"include/linux/gone.h": ""})
	r.HeaderDigest = "headers 58"
	step("kernel with one more header", none)
	write(t, r.Headers, map[string]string{"include/generated/autoconf.h": "#define CONFIG_BUILD_SALT \"\"\n"})
	r.HeaderDigest = "headers 59"
	step("kernel with another option", none)
	r.ToolchainDigest = "another toolchain"
	step("another compiler", none)
	step("another compiler again", all)
	r.HostDigest = "another make"
	step("other host tools", none)

	for _, file := range []string{"trees/object-2/*/object", "trees/object-2/*/command", "facts/object-inputs-1/*",
		"facts/conftest-2/*", "facts/conftest-plan-2/*", "facts/header-view-1/*"} {
		found, err := filepath.Glob(filepath.Join(dir, file))
		if err != nil || len(found) == 0 {
			t.Fatalf("nothing is kept at %s: %v", file, err)
		}
		for _, path := range found {
			if err := os.Chmod(path, 0o600); err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			text[len(text)/2] ^= 1
			if err := os.WriteFile(path, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		notes := all
		switch {
		case strings.HasPrefix(file, "trees/"), strings.HasPrefix(file, "facts/object"):
			notes = "6 tests, 6 remembered; 2 files"
		case strings.HasPrefix(file, "facts/conftest-2/"):
			notes = "6 tests; 2 files, 1 reused"
		}
		step("damaged "+file, notes)
		step("mended "+file, all)
	}
}

// TestTroubleIsNoAnswer has a compiler that is killed, crashes, or has no memory or disk space. Its failure says
// nothing about the kernel, so it must not become an answer of conftest. gcc and clang print the messages in the rows.
func TestTroubleIsNoAnswer(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		trouble string
		want    fault.Kind
	}{
		"killed": {"kill -9 $$", fault.OutOfMemory},
		"its part is killed": {"echo 'gcc: fatal error: Killed signal terminated program cc1' >&2; exit 1",
			fault.OutOfMemory},
		"clang's is killed": {"echo 'clang: error: unable to execute command: Killed' >&2; exit 254", fault.OutOfMemory},
		"no memory": {"echo 'cc1: out of memory allocating 65536 bytes after a total of 1 bytes' >&2; exit 1",
			fault.OutOfMemory},
		"no room for objects": {"echo 'cc1: error: x.o: No space left on device' >&2; exit 1", fault.DiskFull},
		"crash":               {"kill -SEGV $$", fault.Internal},
	} {
		for _, remembers := range []bool{true, false} {
			r := toyWithTests(t)
			cache, err := cas.Open(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = cache.Close() })
			if remembers {
				r.Cache = cache
			}
			// The compiler fails for one of conftest's test programs.
			gcc := filepath.Join(r.Toolchain, "bin/x86_64-cros-linux-gnu-gcc")
			if err := os.Remove(gcc); err != nil {
				t.Fatal(err)
			}
			program.Write(t, gcc, []byte("#!/bin/sh\ncase \"$*\" in *conftest[0-9]*.c*) if grep -q size conftest[0-9]*.c; then "+
				row.trouble+"; fi;; esac\nexec /usr/bin/gcc \"$@\"\n"))
			var log bytes.Buffer
			r.WorkDir, r.Log = t.TempDir(), &log
			if _, err := compile.Modules(t.Context(), r); fault.Of(err) != row.want || fault.Hint(err) == "" {
				t.Errorf("%s, with a cache: %t: Modules = %v (%v, hint %q); want %v\n%s", name, remembers, err, fault.Of(err),
					fault.Hint(err), row.want, &log)
			}
			for _, kept := range []string{"facts/conftest-2", "trees/object-2"} {
				if found, err := filepath.Glob(filepath.Join(cache.Dir(), kept, "*")); err != nil || len(found) > 0 {
					t.Errorf("%s: %v is kept, %v", name, found, err)
				}
			}
		}
	}
}

// TestCacheShared checks that several builds can use one cache folder at the same time. All make the same module.
func TestCacheShared(t *testing.T) {
	t.Parallel()
	r := toyWithTests(t)
	want, _ := compileModule(t, r)
	dir := t.TempDir()
	g, ctx := errgroup.WithContext(t.Context())
	for range 3 {
		r := r
		r.WorkDir = t.TempDir()
		g.Go(func() (err error) {
			if r.Cache, err = cas.Open(dir); err != nil {
				return err
			}
			defer func() { err = errors.Join(err, r.Cache.Close()) }()
			result, err := compile.Modules(ctx, r)
			if err != nil {
				return err
			}
			got, err := os.ReadFile(result.Modules["nvidia"])
			if err == nil && !bytes.Equal(got, want) {
				t.Error("a build beside others makes another module")
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// TestOtherShapes changes a driver's makefiles or scripts to formats that the builder does not know. `make` itself must
// then run conftest.sh, and the module must be the same.
func TestOtherShapes(t *testing.T) {
	t.Parallel()
	for name, files := range map[string]map[string]string{
		"no release in the answers": {"Kbuild": strings.ReplaceAll(testdriver.Kbuild, "conftest/uts_release",
			"conftest/release")},
		"another script": {"conftest.sh": strings.Replace(testdriver.Script, "do compile_test $i",
			"do  compile_test $i", 1)},
		"patches": {"patch-x.h": ""},
		"a question out of plan": {"Kbuild": strings.Replace(testdriver.Kbuild, "\nnvidia.ko: $(OBJECTS)\n",
			"\nconftest/late.h: conftest/headers.h\n\t@$(NV_CONFTEST_CMD) compile_tests '$(NV_CONFTEST_CFLAGS)' symbol_late > "+
				"$@\nnvidia.ko: $(OBJECTS) | conftest/late.h\n", 1)},
	} {
		r := toyWithTests(t)
		write(t, r.Source, files)
		want, _ := compileModule(t, r)
		cache, err := cas.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cache.Close() })
		r.Cache = cache
		var log bytes.Buffer
		r.WorkDir, r.Log = t.TempDir(), &log
		result, err := compile.Modules(t.Context(), r)
		if err != nil {
			t.Fatalf("%s: Modules = %v\n%s", name, err, &log)
		}
		if got, err := os.ReadFile(result.Modules["nvidia"]); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: another module than make's: %v", name, err)
		}
		if !strings.Contains(log.String(), "make has to run conftest.sh itself") {
			t.Errorf("%s: the log does not say that make runs conftest\n%s", name, &log)
		}
	}
}

func TestCacheNeedsDigests(t *testing.T) {
	t.Parallel()
	r := toyWithTests(t)
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	r.Cache, r.SourceDigest = cache, ""
	if _, err := compile.Modules(t.Context(), r); err == nil || !strings.Contains(err.Error(), "needs the digests of") {
		t.Errorf("Modules = %v; want the missing digest named", err)
	}
}
