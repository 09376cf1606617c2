package pipeline_test

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/symbols"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
)

// TestTarballTwins checks that a bucket gets one tarball for each COS build, even if two COS builds share the artifact.
// If the tarball's name belongs to another file, the build must fail and the file must stay.
func TestTarballTwins(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	folder := filepath.Join(t.TempDir(), "bucket")
	cfg := f.config(t, emptyCache(t))
	cfg.Destinations = append(cfg.Destinations, "file://"+folder)
	first := must(t, cfg, request("17800.0.9"))
	if len(first.Tarballs) != 1 || first.Existed || len(first.Repositories) != 1 {
		t.Fatalf("first build: %+v; want one repository and one tarball, both new", first)
	}
	driver := target.Driver{Version: version, Flavour: target.Open}
	tarball := func(id string) string {
		return filepath.Join(folder, tarball.TarballName(target.Kernel{BuildID: id, Board: "lakitu"}, driver))
	}
	if _, err := os.Stat(tarball("17800.0.9")); err != nil {
		t.Error(err)
	}
	if again := must(t, cfg, request("17800.0.9")); !again.Reused || !again.Existed {
		t.Errorf("the same again: %+v; want it reused", again)
	}

	// Another COS build with the same fingerprint has the same artifact and its own tarball.
	f.kernel(t, "17800.1.9", headerFiles())
	other := must(t, cfg, request("17800.1.9"))
	if other.Digest != first.Digest || !other.Reused || len(other.Tarballs) != 1 ||
		other.Tarballs[0].SHA256 != first.Tarballs[0].SHA256 || other.Tarballs[0].URL == first.Tarballs[0].URL {
		t.Errorf("another COS build with the same fingerprint: %+v; want %s with a tarball of its own", other, first.Digest)
	}

	// A file with the tarball's name and other content must stay unchanged.
	if err := os.RemoveAll(filepath.Join(folder, "17800.0.9")); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(tarball("17800.0.9")), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tarball("17800.0.9"), []byte("other"), 0o644); err != nil {
		t.Fatal(err)
	}
	if res, _, err := build(t, cfg, request("17800.0.9")); !fault.Is(err, fault.PublishRefused) {
		t.Errorf("over other bytes: %+v, %v; want it refused", res, err)
	}
	got, err := os.ReadFile(tarball("17800.0.9"))
	if diff := cmp.Diff("other", string(got)); diff != "" || err != nil {
		t.Errorf("the object changed, %v (-want +got):\n%s", err, diff)
	}
}

// TestLabels checks that the driver gets the labels of COS's list and the configured labels, even if its tarball exists
// already.
func TestLabels(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	f.put(t, "cos/17800.0.9/lakitu/gpu_default_version", []byte(version+"\n"))
	folder := filepath.Join(t.TempDir(), "bucket")
	cfg := f.config(t, emptyCache(t))
	cfg.Destinations = append(cfg.Destinations, "file://"+folder)
	label := func(name string) string {
		text, err := os.ReadFile(filepath.Join(folder, "17800.0.9/lakitu", name))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		return string(text)
	}
	req := request("17800.0.9")
	cfg.LabelsLater = true
	if res := must(t, cfg, req); len(res.Labels) != 0 || label("gpu_default_version") != "" {
		t.Errorf("with labels later: %+v, DEFAULT %q; want none", res.Labels, label("gpu_default_version"))
	}
	cfg.LabelsLater = false
	if res := must(t, cfg, req); !res.Reused || res.Existed || label("gpu_default_version") != version+"\n" {
		t.Errorf("again: %+v, DEFAULT %q; want what COS says", res, label("gpu_default_version"))
	}
	cfg.Labels = []string{"LATEST"}
	if res := must(t, cfg, req); !res.Reused || res.Existed || label("gpu_default_version") != version+"\n" ||
		label("gpu_latest_version") != version+"\n" {
		t.Errorf("with a label: %+v, DEFAULT %q, LATEST %q; want both", res, label("gpu_default_version"),
			label("gpu_latest_version"))
	}
	cfg.Labels = []string{"R470"}
	if res, _, err := build(t, cfg, req); !fault.Is(err, fault.Usage) {
		t.Errorf("with the label of another branch: %+v, %v; want kind usage", res, err)
	}
	cfg.Labels = nil
	if res := must(t, cfg, req); !res.Existed || label("gpu_latest_version") != version+"\n" {
		t.Errorf("the same again: %+v, LATEST %q; want nothing changed", res, label("gpu_latest_version"))
	}
}

// TestDebugSymbols checks that debug symbols are published as a referrer, and that they do not change the artifact.
func TestDebugSymbols(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	files := driverFiles()
	files["kernel-open/Makefile"] =
		"modules:\n\t@echo '  CC [M]  nv.o'\n\t@$(CC) $(if $(findstring g0,$(KCFLAGS)),,-g) -nostdlib -r " +
			"-Wl,--build-id=sha1 nv.c -o nvidia.ko\n"
	f.driver(t, files)
	cfg := f.config(t, emptyCache(t))
	plain := must(t, cfg, request("17800.0.9"))
	repo, err := registry.Open(f.repo, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	subject, err := repo.Resolve(t.Context(), plain.Digest)
	if err != nil {
		t.Fatal(err)
	}
	// Anybody with the right to push can attach data of this artifact type. It must not count as debug symbols.
	if _, err := repo.Attach(t.Context(), subject, symbols.ArtifactType, []byte("junk"), nil); err != nil {
		t.Fatal(err)
	}
	cfg.DebugSymbols = true
	res := must(t, cfg, request("17800.0.9"))
	if res.Digest != plain.Digest || res.Reused || res.Symbols == "" {
		t.Errorf("with debug symbols: %+v; want %s, and symbols", res, plain.Digest)
	}
	if again := must(t, cfg, request("17800.0.9")); !again.Reused {
		t.Errorf("the same again: %+v; want it reused", again)
	}
}

// TestBucketIsCheckedBeforeTheCompile checks the bucket's permissions with a server that stands for Google's. The path
// and the bodies are from https://cloud.google.com/storage/docs/json_api/v1/buckets/testIamPermissions.
func TestBucketIsCheckedBeforeTheCompile(t *testing.T) {
	for _, row := range []struct {
		name           string
		status         int
		body           string
		kind           fault.Kind
		phases         []string
		warning, error string
	}{
		{"no such bucket", http.StatusNotFound,
			`{"error":{"code":404,"message":"The specified bucket does not exist."}}`, fault.Usage, whole[:2], "", "bucket"},
		{"an account that may only read", http.StatusOK, `{"kind":"storage#testIamPermissionsResponse"}`,
			fault.PublishRefused, whole,
			"publishing may fail after the compile: publish to gs://mine/drivers: this account lacks storage.objects.create",
			"gs://mine/drivers"},
	} {
		t.Run(row.name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				status, body := http.StatusForbidden, `{"error":{"code":403,"message":"no access"}}`
				switch {
				case strings.HasSuffix(r.URL.Path, "/iam/testPermissions"):
					status, body = row.status, row.body
				case r.Method == http.MethodGet: // the bucket has no object
					status, body = http.StatusNotFound, `{"error":{"code":404,"message":"No such object"}}`
				}
				w.WriteHeader(status)
				_, _ = io.WriteString(w, body)
			}))
			defer server.Close()
			t.Setenv("STORAGE_EMULATOR_HOST", server.URL)
			cfg := newFarm(t).config(t, emptyCache(t))
			cfg.Destinations = append(cfg.Destinations, "gs://mine/drivers")
			res, log, err := build(t, cfg, request("17800.0.9"))
			if !fault.Is(err, row.kind) || !strings.Contains(err.Error(), row.error) || !strings.Contains(log, row.warning) {
				t.Errorf("Run = %v (%v), log:\n%s\nwant %v with %q, and %q in the log", err, fault.Of(err), log, row.kind,
					row.error, row.warning)
			}
			if diff := cmp.Diff(row.phases, phases(res)); diff != "" {
				t.Errorf("phases (-want +got):\n%s", diff)
			}
		})
	}
}
