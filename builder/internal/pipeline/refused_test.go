package pipeline_test

import (
	"bytes"
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

// TestRenewRefusedIsRemembered builds an old artifact again, and the destination refuses the result. Later runs must
// not compile it again until some days have passed, unless the user asks for it with RetryRefused.
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
			try("at first", true)
			try("again", false)
			age(t, cfg, row.after-time.Hour)
			try("before its end", false)
			age(t, cfg, 2*time.Hour)
			try("after its end", true)
			try("after that", false)
			cfg.RetryRefused = true
			try("with RetryRefused", true)
			cfg.RetryRefused, cfg.RebuildAfter = false, time.Hour
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

// readOnly answers 403 to each upload of a manifest.
type readOnly struct{}

func (readOnly) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method != http.MethodPut || !strings.Contains(r.URL.Path, "/manifests/") {
		return http.DefaultTransport.RoundTrip(r)
	}
	return &http.Response{StatusCode: http.StatusForbidden, Status: "403 Forbidden", Body: http.NoBody, Request: r,
		Header: http.Header{}}, nil
}
