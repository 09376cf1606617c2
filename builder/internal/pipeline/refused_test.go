package pipeline_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
)

// compiled reports whether a build began to compile.
func compiled(res *pipeline.Result) bool { return slices.Contains(phases(res), "compile") }

// age changes the time of the cache's only refusal to an earlier time: it subtracts by.
func age(t *testing.T, cfg pipeline.Config, by time.Duration) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(cfg.Cache.Dir(), "facts", "refused-v1", "*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("remembered: %v, %v; want one refusal", files, err)
	}
	raw, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	_, value, _ := bytes.Cut(raw, []byte("\n"))
	var known map[string]any
	if err := json.Unmarshal(value, &known); err != nil {
		t.Fatal(err)
	}
	at, err := time.Parse(time.RFC3339, known["at"].(string))
	if err != nil {
		t.Fatal(err)
	}
	known["at"] = at.Add(-by)
	if value, err = json.Marshal(known); err == nil {
		err = os.WriteFile(files[0], fmt.Appendf(nil, "%x\n%s", sha256.Sum256(value), value), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// tryOverTime calls try at the times when the answer to a build changes. The first failure must be remembered for as
// long as after says, and the next one again. With RetrySince set to now, the build must be tried once more. try gets
// whether the build must compile.
func tryOverTime(t *testing.T, cfg *pipeline.Config, after time.Duration, try func(when string, compiles bool)) {
	t.Helper()
	try("at first", true)
	try("again", false)
	age(t, *cfg, after-time.Hour)
	try("before its end", false)
	age(t, *cfg, 2*time.Hour)
	try("after its end", true)
	try("after that", false)
	cfg.RetrySince = time.Now()
	try("with RetrySince", true)
}

// TestRenewRefusedIsRemembered builds an old artifact again, and the destination refuses the result. Later runs must
// not compile it again until some days have passed, unless the user asks for it with RetrySince.
func TestRenewRefusedIsRemembered(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		bytes bool // each compile gives other bytes; otherwise the registry denies the new statements
		after time.Duration
	}{"other bytes": {true, 7 * 24 * time.Hour}, "denied": {false, 24 * time.Hour}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFarm(t)
			if row.bytes {
				files := driverFiles()
				files["kernel-open/Makefile"] = "modules:\n" +
					"\t" + `@echo "const char salt[] = \"$$(date +%N)\";" >>nv.c` + "\n" +
					"\t@$(CC) -c nv.c -o nvidia.ko\n"
				f.driver(t, files)
			}
			cfg := f.config(t, emptyCache(t))
			first := must(t, cfg, request("17800.0.9"))
			cfg.RebuildAfter = time.Nanosecond
			if !row.bytes {
				cfg.Registry = func(string) registry.Options { return registry.Options{Transport: readOnly{}} }
			}
			try := func(when string, want bool) {
				t.Helper()
				res, log, err := build(t, cfg, request("17800.0.9"))
				if !fault.Is(err, fault.PublishRefused) || compiled(res) != want {
					t.Fatalf("%s: Run = %v, phases %v; want it refused, compiled: %t\n%s", when, err, phases(res), want, log)
				}
				if !want && (!strings.Contains(err.Error(), first.Digest+" is not built again before ") ||
					!strings.Contains(fault.Hint(err), "to build it again now: --retry-failed")) {
					t.Errorf("%s: Run = %v, hint %q; want until when, and what to do", when, err, fault.Hint(err))
				}
			}
			tryOverTime(t, &cfg, row.after, try)
			try("after that, with the same RetrySince", false)
			cfg.RetrySince, cfg.RebuildAfter = time.Time{}, time.Hour
			if res := must(t, cfg, request("17800.0.9")); !res.Reused {
				t.Errorf("the artifact is young: %+v; want it reused", res)
			}
			if !row.bytes {
				cfg.RebuildAfter, cfg.Registry = time.Nanosecond, nil
				cfg.Destinations = []string{f.repo + "/other"}
				must(t, cfg, request("17800.0.9")) // this destination has refused nothing yet
			}
		})
	}
}

// A build because of age that fails before it is published is not compiled again in each run either, but only after
// some time, with other inputs or settings, or if the user asks for it.
func TestRenewFailedIsRemembered(t *testing.T) {
	t.Parallel()
	boot := func(t *testing.T, f *farm) {
		var archive bytes.Buffer
		tarOf(t, map[string]string{"vmlinuz": "no kernel"}, gzip.NewWriter(&archive))
		f.putChecked(t, "cos/17800.0.9/lakitu/prebake-boot.tgz", archive.Bytes())
	}
	broken := driverFiles()
	broken["kernel-open/nv.c"] = "int f(int a, int b);\nint nv(void) { return f(1); }\n"
	for name, row := range map[string]struct {
		spoil func(t *testing.T, f *farm, cfg *pipeline.Config) // before the build because of age
		mend  func(t *testing.T, f *farm, cfg *pipeline.Config) // changes an input or a setting
		kind  fault.Kind
		after time.Duration
	}{
		"load test": {func(_ *testing.T, _ *farm, cfg *pipeline.Config) { cfg.LoadTest = pipeline.LoadTestRequire },
			func(_ *testing.T, _ *farm, cfg *pipeline.Config) { cfg.LoadTest = pipeline.LoadTestAuto },
			fault.LoadTestFailed, 24 * time.Hour},
		"load test, until there is a boot image": {
			func(_ *testing.T, _ *farm, cfg *pipeline.Config) { cfg.LoadTest = pipeline.LoadTestRequire },
			func(t *testing.T, f *farm, _ *pipeline.Config) { boot(t, f) }, fault.LoadTestFailed, 24 * time.Hour},
		"load test without nvmlprobe": {
			func(t *testing.T, f *farm, cfg *pipeline.Config) {
				files := driverFiles()
				files["libnvidia-ml.so."+version+"*"] = text(t, standInNVML(t))
				f.driver(t, files)
				boot(t, f)
				cfg.NVMLProbe = "none"
			},
			func(_ *testing.T, _ *farm, cfg *pipeline.Config) { cfg.LoadTest = pipeline.LoadTestOff }, fault.Usage,
			24 * time.Hour},
		"compile": {func(t *testing.T, f *farm, _ *pipeline.Config) { f.driver(t, broken) },
			func(t *testing.T, f *farm, _ *pipeline.Config) { f.driver(t, driverFiles()) }, fault.APIBreak, 7 * 24 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFarm(t)
			cfg := f.config(t, emptyCache(t))
			first := must(t, cfg, request("17800.0.9"))
			cfg.RebuildAfter = time.Nanosecond
			row.spoil(t, f, &cfg)
			try := func(when string, want bool) {
				t.Helper()
				res, log, err := build(t, cfg, request("17800.0.9"))
				if !fault.Is(err, row.kind) || compiled(res) != want || res.Renewal != want || res.Remembered == want {
					t.Fatalf("%s: Run = %v (%v), phases %v; want %v, compiled: %t\n%s", when, err, fault.Of(err), phases(res),
						row.kind, want, log)
				}
				if !want && (!strings.Contains(err.Error(), first.Digest+" is not built again before ") ||
					!strings.Contains(fault.Hint(err), "to build it again now: --retry-failed")) {
					t.Errorf("%s: Run = %v, hint %q; want until when, and what to do", when, err, fault.Hint(err))
				}
			}
			tryOverTime(t, &cfg, row.after, try)
			cfg.RetrySince = time.Time{}
			row.mend(t, f, &cfg)
			if res, log, err := build(t, cfg, request("17800.0.9")); !compiled(res) {
				t.Errorf("after the mend: Run = %v, phases %v; want it compiled\n%s", err, phases(res), log)
			}
		})
	}
}

// readOnly answers 403 to each upload of a manifest.
type readOnly struct{}

func (readOnly) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method != http.MethodPut || !strings.Contains(r.URL.Path, "/manifests/") {
		return http.DefaultTransport.RoundTrip(r)
	}
	return &http.Response{StatusCode: http.StatusForbidden, Status: "403 Forbidden", Body: http.NoBody, Request: r,
		Header: http.Header{}}, nil
}
