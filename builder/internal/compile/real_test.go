package compile_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/hostfile"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/target"
)

// onceMore ends the name of a build for which the cache already has all results.
const onceMore = " once more"

// TestRealSameBytes compares modules of a real driver for a real kernel. Three builds must give the same bytes: a plain
// build with debug information, a build with an empty cache, and a build with a filled cache. A plain build has no
// cache and no precompiled headers.
//
// PREBAKE_CELLS is a list of BUILD_ID/VERSION, or BUILD_ID/VERSION-open for the open flavour. The test compiles these
// cells in that order with one cache, and compares each with a plain build of the cell. If a cell begins with "=", the
// test compares it with the plain build of the last cell that has no "=".
//
// PREBAKE_REFERENCES is a cache folder for the results of plain builds, so that a later run with the same inputs, tools
// and code of this package uses them again. PREBAKE_FILLED is a cache folder that contains the cells already, in place
// of an empty one. A run with it does not test the empty cache; TestReproduce of deploy/e2e does.
func TestRealSameBytes(t *testing.T) {
	mirror, cells := os.Getenv("PREBAKE_MIRROR"), os.Getenv("PREBAKE_CELLS")
	if mirror == "" || cells == "" {
		t.Skip("PREBAKE_MIRROR and PREBAKE_CELLS name no mirror and no cells to compile")
	}
	folder, times := os.Getenv("PREBAKE_FILLED"), []string{onceMore}
	if folder == "" {
		folder, times = filepath.Join(t.TempDir(), "cache"), []string{" for the first time", onceMore}
	}
	cache, err := cas.Open(folder)
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	references := cache
	if dir := os.Getenv("PREBAKE_REFERENCES"); dir != "" {
		if references, err = cas.Open(dir); err != nil {
			t.Fatal(err)
		}
		defer references.Close()
	}
	host, err := sandbox.HostTools()
	if err != nil {
		t.Fatal(err)
	}
	kernels, err := cosbucket.Open(t.Context(), mirror+"/cos")
	if err != nil {
		t.Fatal(err)
	}
	defer kernels.Close()
	drivers, err := cosbucket.Open(t.Context(), mirror+"/drivers")
	if err != nil {
		t.Fatal(err)
	}
	defer drivers.Close()
	var want, answers map[string]string
	for cell := range strings.FieldsSeq(cells) {
		cell, same := strings.CutPrefix(cell, "=")
		id, version, _ := strings.Cut(cell, "/")
		version, isOpen := strings.CutSuffix(version, "-"+string(target.Open))
		flavour := target.Proprietary
		if isOpen {
			flavour = target.Open
		}
		k, err := cossrc.Fetch(t.Context(), kernels, cache, id, "lakitu", func(string) {})
		if err != nil {
			t.Fatal(err)
		}
		d, err := nvsrc.Fetch(t.Context(), drivers, cache, version, k.Kernel.Arch, func(string) {})
		if err != nil {
			t.Fatal(err)
		}
		source, err := d.Source(flavour)
		if err != nil {
			t.Fatal(err)
		}
		r := compile.Request{
			Source: source, Headers: k.Headers, Toolchain: k.Toolchain, Env: k.Env, Release: k.Kernel.Release,
			Driver: target.Driver{Version: version, Flavour: flavour}, Arch: k.Kernel.Arch,
			HeaderDigest: k.HeadersDigest, ToolchainDigest: k.ToolchainDigest, SourceDigest: d.SourceDigest, HostDigest: host,
		}
		if !same {
			want, answers = byMakeAlone(t, references, r, cell)
		}
		r.Cache = cache
		if folder == os.Getenv("PREBAKE_FILLED") && !same {
			fillObjects(t, r, cell)
		}
		for _, what := range times {
			got, found := compileReal(t, r, cell+what)
			if diff := cmp.Diff(answers, found); diff != "" {
				t.Errorf("%s%s: conftest's answers differ from make's (-make +builder):\n%s", cell, what, diff)
			}
			if len(got) != len(want) {
				t.Fatalf("%s%s: %d modules; want %d", cell, what, len(got), len(want))
			}
			for name, path := range want {
				if !sameFile(t, got[name], path) {
					t.Errorf("%s%s: %s is not what make alone makes (%s, %s)", cell, what, name, got[name], path)
				}
			}
		}
	}
}

// fillObjects compiles a cell once before the test compares anything, so that the cache has the cell's objects. They
// can be missing: an earlier version of this package, with other keys of objects, may have filled the cache.
func fillObjects(t *testing.T, r compile.Request, cell string) {
	t.Helper()
	r.WorkDir, r.Log = t.TempDir(), io.Discard
	result, err := compile.Modules(t.Context(), r)
	if err != nil {
		t.Fatalf("%s: %v", cell, err)
	}
	for _, p := range result.Phases {
		if p.Name == "compile" {
			t.Logf("%s before: %s %.1f s, %s", cell, p.Name, p.Seconds, p.Note)
		}
	}
}

// byMakeAlone returns the result of compileReal for a plain build with debug information. references is a cache folder
// that keeps the result for later runs.
func byMakeAlone(t *testing.T, references *cas.Cache, r compile.Request, cell string) (modules,
	answers map[string]string) {
	t.Helper()
	code, err := cas.DigestTree(t.Context(), ".", nil)
	if err != nil {
		t.Fatal(err)
	}
	key := cas.NewKey("by make alone").Add("code", code).Add("headers", r.HeaderDigest).Add("toolchain",
		r.ToolchainDigest).Add("source", r.SourceDigest).Add("host tools", r.HostDigest).
		Add("flavour", string(r.Driver.Flavour))
	const answersFile = "answers.json"
	dir, cached, err := references.Tree(t.Context(), "reference", key.String(), func(_ context.Context, dir string) error {
		r.Debug = true
		made, answers := compileReal(t, r, cell+" by make alone")
		for name, file := range made {
			if err := hostfile.Copy(filepath.Join(dir, name+".ko"), file); err != nil {
				return err
			}
		}
		raw, err := json.Marshal(answers)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, answersFile), raw, 0o644)
	})
	if err != nil {
		t.Fatal(err)
	}
	if cached {
		t.Logf("%s by make alone: kept from an earlier run of this test", cell)
	}
	raw, err := os.ReadFile(filepath.Join(dir, answersFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, &answers); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil || len(files) == 0 {
		t.Fatalf("modules in %s: %v, %v", dir, files, err)
	}
	modules = map[string]string{}
	for _, file := range files {
		modules[strings.TrimSuffix(filepath.Base(file), ".ko")] = file
	}
	return modules, answers
}

// compileReal compiles the driver and returns its modules and conftest's answers. Without r.Cache, the build is a plain
// one.
func compileReal(t *testing.T, r compile.Request, what string) (modules, answers map[string]string) {
	t.Helper()
	var log bytes.Buffer
	r.WorkDir, r.Log = t.TempDir(), &log
	result, err := compile.Modules(t.Context(), r)
	if err != nil {
		t.Fatalf("%s: %v\n%s", what, err, log.Bytes()[max(0, log.Len()-4000):])
	}
	for _, p := range result.Phases {
		t.Logf("%s: %-9s %6.1f s  %s", what, p.Name, p.Seconds, p.Note)
	}
	for line := range strings.Lines(log.String()) {
		if strings.HasPrefix(line, "prebake: ") {
			t.Log(strings.TrimSpace(line))
		}
	}
	// `make` makes the same modules if it runs conftest itself. So only the log shows that the builder gave up.
	if r.Cache != nil && strings.Contains(log.String(), "make has to run conftest.sh itself") {
		t.Errorf("%s: make has to run conftest.sh itself", what)
	}
	if strings.HasSuffix(what, onceMore) {
		checkReuse(t, what, result)
	}
	checkPreambles(t, r.WorkDir)
	if len(result.Debug) > 0 != r.Debug {
		t.Errorf("%s: debug files %v; asked for: %t", what, result.Debug, r.Debug)
	}
	return result.Modules, readAnswers(t, filepath.Join(r.WorkDir, "src/conftest"))
}

// readAnswers reads the headers with conftest's answers. It sorts the lines of each header, because `make` runs the
// tests in no fixed order.
func readAnswers(t *testing.T, dir string) map[string]string {
	t.Helper()
	headers, err := filepath.Glob(filepath.Join(dir, "*.h"))
	if err != nil || len(headers) == 0 {
		t.Fatalf("no answers in %s: %v", dir, err)
	}
	answers := map[string]string{}
	for _, name := range headers {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for line := range strings.Lines(string(text)) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "//") {
				lines = append(lines, line)
			}
		}
		slices.Sort(lines)
		answers[filepath.Base(name)] = strings.Join(slices.Compact(lines), "\n")
	}
	return answers
}

// checkReuse checks a build that repeats an earlier one. It may run at most 10 conftest tests again, and compile at
// most 3 sources: those that contain the kernel's release.
func checkReuse(t *testing.T, what string, result *compile.Result) {
	t.Helper()
	for _, p := range result.Phases {
		var all, known int
		switch p.Name {
		case "conftest":
			if n, err := fmt.Sscanf(p.Note, "%d tests, %d remembered", &all, &known); n != 2 || all-known > 10 {
				t.Errorf("%s: conftest: %s (%v)", what, p.Note, err)
			}
		case "compile":
			if n, err := fmt.Sscanf(p.Note, "%d files, %d reused", &all, &known); n != 2 || all-known > 3 {
				t.Errorf("%s: compile: %s (%v)", what, p.Note, err)
			}
		}
	}
}

// checkPreambles fails the test if a precompiled header could not be made. Without the header the modules are the same,
// so no other check notices its absence.
func checkPreambles(t *testing.T, work string) {
	t.Helper()
	headers, err := filepath.Glob(filepath.Join(work, "preambles", "*.h"))
	if err != nil {
		t.Fatal(err)
	}
	for _, header := range headers {
		if made, err := filepath.Glob(strings.TrimSuffix(header, ".h") + "-*.pch"); err != nil || len(made) == 0 {
			said, _ := filepath.Glob(strings.TrimSuffix(header, ".h") + "-*.said")
			t.Errorf("no compiled preamble of %s; see %v", header, said)
		}
	}
}

func sameFile(t *testing.T, a, b string) bool {
	t.Helper()
	one, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	two, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Equal(one, two)
}
