package pipeline_test

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
)

// refusingRegistry starts an empty registry. It answers every write with the given status and body.
func refusingRegistry(t *testing.T, status int, body string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/v2/":
		case r.Method == http.MethodGet || r.Method == http.MethodHead:
			w.WriteHeader(http.StatusNotFound)
		default:
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		}
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func TestFailures(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name   string
		change func(t *testing.T, f *farm, cfg *pipeline.Config, r *pipeline.Request)
		kind   fault.Kind
		text   string
		phases []string
	}{
		{"unknown BUILD_ID", func(_ *testing.T, _ *farm, _ *pipeline.Config, r *pipeline.Request) {
			r.BuildID = "17800.0.99"
		},
			fault.InputMissing, "17800.0.99", whole[:1]},
		{"unknown driver", func(_ *testing.T, _ *farm, _ *pipeline.Config, r *pipeline.Request) { r.Driver = "535.999.99" },
			fault.InputMissing, "535.999.99", whole[:1]},
		{"flavour that the release lacks",
			func(_ *testing.T, _ *farm, _ *pipeline.Config, r *pipeline.Request) { r.Flavour = target.Proprietary },
			fault.Unsupported, "proprietary", whole[:1]},
		{"wrong checksum", func(t *testing.T, f *farm, _ *pipeline.Config, _ *pipeline.Request) {
			f.put(t, "cos/17800.0.9/lakitu/kernel-headers.tgz.md5", []byte(strings.Repeat("0", 32)))
		}, fault.Checksum, "kernel-headers.tgz", whole[:1]},
		{"no key, told before the compile",
			func(_ *testing.T, _ *farm, cfg *pipeline.Config, _ *pipeline.Request) { cfg.Key += ".none" },
			fault.Usage, "load signing key", whole[:2]},
		{"no registry, told before the compile", func(_ *testing.T, _ *farm, cfg *pipeline.Config, _ *pipeline.Request) {
			cfg.Destinations = []string{"127.0.0.1:1/prebake/driver"}
		}, fault.Transient, "127.0.0.1:1", whole[:2]},
		{"registry that may only be read, told before the compile",
			func(t *testing.T, _ *farm, cfg *pipeline.Config, _ *pipeline.Request) {
				cfg.Destinations = []string{refusingRegistry(t, http.StatusForbidden,
					`{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}`) + "/prebake/driver"}
			}, fault.PublishRefused, "denied", whole[:2]},
		{"registry without the repository, told before the compile",
			func(t *testing.T, _ *farm, cfg *pipeline.Config, _ *pipeline.Request) {
				cfg.Destinations = []string{refusingRegistry(t, http.StatusNotFound,
					`{"errors":[{"code":"NAME_UNKNOWN","message":"The repository with name 'prebake/driver' does not exist"}]}`) +
					"/prebake/driver"}
			}, fault.PublishRefused, "NAME_UNKNOWN", whole[:2]},
		{"API break", func(t *testing.T, f *farm, _ *pipeline.Config, _ *pipeline.Request) {
			files := driverFiles()
			files["kernel-open/nv.c"] = "int f(int a, int b);\nint nv(void) { return f(1); }\n"
			f.driver(t, files)
		}, fault.APIBreak, "error: too few arguments to function", whole[:3]},
		{"module for another kernel", func(t *testing.T, f *farm, _ *pipeline.Config, _ *pipeline.Request) {
			files := driverFiles()
			files["kernel-open/nv.c"] = strings.Replace(files["kernel-open/nv.c"], "6.1.0-9-test", "6.1.0-8-test", 1)
			f.driver(t, files)
		}, fault.CheckFailed, "6.1.0-8-test", whole[:4]},
		{"load test demanded without a boot image", func(_ *testing.T, _ *farm, cfg *pipeline.Config, _ *pipeline.Request) {
			cfg.LoadTest = pipeline.LoadTestRequire
		}, fault.LoadTestFailed, "no bootable kernel", whole[:5]},
		{"out of time", func(_ *testing.T, _ *farm, cfg *pipeline.Config, _ *pipeline.Request) { cfg.CompileTimeout = 1 },
			fault.TimedOut, "longer than 1ns", whole[:3]},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			f := newFarm(t)
			cfg, r := f.config(t, emptyCache(t)), request("17800.0.9")
			row.change(t, f, &cfg, &r)
			res, log, err := build(t, cfg, r)
			if !fault.Is(err, row.kind) || !strings.Contains(err.Error(), row.text) {
				t.Errorf("Run = %v (%v); want %v with %q", err, fault.Of(err), row.kind, row.text)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("Run = %q; want one line", err)
			}
			if !strings.Contains(log, row.text) {
				t.Errorf("the log lacks %q:\n%s", row.text, log)
			}
			if diff := cmp.Diff(row.phases, phases(res)); diff != "" || !res.Phases[len(res.Phases)-1].Failed {
				t.Errorf("phases %+v, the last one failed (-want +got):\n%s", res.Phases, diff)
			}
			if left, err := filepath.Glob(filepath.Join(cfg.Cache.Dir(), "work", "*", "*")); err != nil || len(left) > 0 {
				t.Errorf("work folders left: %v, %v", left, err)
			}
			repo, err := registry.Open(f.repo, registry.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := repo.Resolve(context.WithoutCancel(t.Context()),
				bundle.KernelTag(target.Kernel{BuildID: "17800.0.9", Board: "lakitu"},
					target.Driver{Version: version, Flavour: target.Open})); !fault.Is(err, fault.NoArtifact) {
				t.Errorf("Resolve after a failure = %v; want that nothing is there", err)
			}
		})
	}
}
