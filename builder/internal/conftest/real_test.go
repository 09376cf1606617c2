package conftest_test

import (
	"bytes"
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/conftest"
	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/target"
)

// TestRealPlans asks every driver of a mirror, in each of its flavours, for its plan, on the newest kernel of the
// mirror. Nothing may be left to `make`: the builder must know the questions, and conftest.sh must have each of them.
// The test stops each build at the first answer, so a driver takes some seconds.
//
// PREBAKE_MIRROR is the mirror's URL. PREBAKE_FILLED is a cache folder that may have the unpacked inputs.
func TestRealPlans(t *testing.T) {
	mirror := os.Getenv("PREBAKE_MIRROR")
	if mirror == "" {
		t.Skip("PREBAKE_MIRROR names no mirror with kernels and drivers")
	}
	inputs := os.Getenv("PREBAKE_FILLED")
	if inputs == "" {
		inputs = filepath.Join(t.TempDir(), "inputs")
	}
	fetched, answers := openCache(t, inputs), filepath.Join(t.TempDir(), "answers")
	kernels, drivers := openBucket(t, mirror+"/cos"), openBucket(t, mirror+"/drivers")
	ids, err := kernels.BuildIDs(t.Context())
	if err != nil || len(ids) == 0 {
		t.Fatalf("BuildIDs = %v, %v", ids, err)
	}
	k, err := cossrc.Fetch(t.Context(), kernels, fetched, ids[0], "lakitu", func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	host, err := sandbox.HostTools()
	if err != nil {
		t.Fatal(err)
	}
	request := compile.Request{
		Headers: k.Headers, Toolchain: k.Toolchain, Env: k.Env, Release: k.Kernel.Release, Arch: k.Kernel.Arch,
		HeaderDigest: k.HeadersDigest, ToolchainDigest: k.ToolchainDigest, HostDigest: host, Cache: openCache(t, answers),
	}
	names, err := drivers.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	known, versions := map[string]bool{}, 0
	for _, name := range names {
		version, arch, ok := cosbucket.ParseRunfile(name)
		if !ok || arch != k.Kernel.Arch {
			continue
		}
		versions++
		d, err := nvsrc.Fetch(t.Context(), drivers, fetched, version, arch, func(string) {})
		if err != nil {
			t.Fatal(err)
		}
		for _, flavour := range d.Flavours {
			r := request
			if r.Source, err = d.Source(flavour); err != nil {
				t.Fatal(err)
			}
			r.Driver, r.SourceDigest = target.Driver{Version: version, Flavour: flavour}, d.SourceDigest
			if log := untilFirstAnswer(t, r); strings.Contains(log, "make has to run conftest.sh itself") {
				t.Errorf("%s: make has to run conftest.sh itself:\n%s", r.Driver, log)
				continue
			}
			checkPlan(t, r, newPlan(t, answers, known))
		}
	}
	if versions == 0 {
		t.Fatalf("%s/drivers has no driver", mirror)
	}
}

func openCache(t *testing.T, dir string) *cas.Cache {
	t.Helper()
	c, err := cas.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func openBucket(t *testing.T, url string) *cosbucket.Bucket {
	t.Helper()
	b, err := cosbucket.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// untilFirstAnswer compiles until the first question of conftest is answered, and returns the log.
func untilFirstAnswer(t *testing.T, r compile.Request) string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var log bytes.Buffer
	asked := false
	r.WorkDir, r.Log = t.TempDir(), &log
	r.Progress = func(string, int, int) {
		asked = true
		cancel()
	}
	if result, err := compile.Modules(ctx, r); err == nil || !asked {
		t.Fatalf("%s: Modules = %+v, %v; want the first answer and then a stop\n%s", r.Driver, result, err, log.String())
	}
	return log.String()
}

// newPlan returns the only plan in the cache folder that is not among the known ones, and adds it to them.
func newPlan(t *testing.T, cache string, known map[string]bool) *conftest.Plan {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(cache, "facts", "conftest-plan-*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	fresh := slices.DeleteFunc(files, func(file string) bool { return known[file] })
	if len(fresh) != 1 {
		t.Fatalf("the cache has the new plans %v beside %v; want one", fresh, slices.Sorted(maps.Keys(known)))
	}
	known[fresh[0]] = true
	raw, err := os.ReadFile(fresh[0])
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := bytes.Cut(raw, []byte("\n")) // the first line is the fact's checksum
	plan, err := conftest.ParsePlan(string(text))
	if err != nil {
		t.Fatal(err)
	}
	return plan
}

// checkPlan fails the test if the driver's conftest.sh cannot answer a question of the plan.
func checkPlan(t *testing.T, r compile.Request, plan *conftest.Plan) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(r.Source, "conftest.sh"))
	if err != nil {
		t.Fatal(err)
	}
	script, err := conftest.ParseScript(text)
	if err != nil {
		t.Errorf("%s: ParseScript = %v", r.Driver, err)
		return
	}
	if len(plan.Headers) == 0 || !script.OneHeader() || len(plan.All()) < 100 {
		t.Errorf("%s: plan of %d headers and %d tests; conftest.sh can test one header: %t; want more than 100 tests",
			r.Driver, len(plan.Headers), len(plan.All()), script.OneHeader())
	}
	for _, name := range append(plan.All(), "uts_release") {
		if !script.Knows(name) {
			t.Errorf("%s: conftest.sh has no test %s, so make has to run it", r.Driver, name)
		}
	}
	t.Logf("%s: %d headers and %d tests, nothing left to make", r.Driver, len(plan.Headers), len(plan.All()))
}
