package deploy_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/prebake/prebake/deploy/internal/testserver"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/program"
)

// programs is the folder with the server's program, built once for all tests of this package.
var programs string

var buildServer sync.Once

// serverProgram builds the server once, and returns its path.
func serverProgram(t *testing.T) string {
	t.Helper()
	built := filepath.Join(programs, "server")
	buildServer.Do(func() { program.Compile(t, built, "server", runtime.GOARCH, false) })
	if _, err := os.Stat(built); err != nil {
		t.Fatal(err) // the test that built it has failed
	}
	return built
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "prebake-deploy-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	programs = dir
	code := m.Run()
	if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

const secret = testserver.Token

// runningServer is a server process, with a mirror that has two COS builds.
type runningServer struct {
	Binary, URL, Host string
	Client            *api.Client
}

// startServer runs the real server until the test ends.
func startServer(t *testing.T) runningServer {
	t.Helper()
	built := serverProgram(t)
	dir := t.TempDir()
	for _, id := range []string{"17800.66.78", "17800.66.90"} {
		folder := filepath.Join(dir, "mirror", id, "lakitu")
		if err := os.MkdirAll(folder, 0o755); err != nil {
			t.Fatal(err)
		}
		for file, text := range map[string]string{
			"kernel_commit": strings.Repeat("a", 40) + "\n", "gpu_default_version": "535.261.03\n",
			"gpu_latest_version": "535.261.03\n",
		} {
			if err := os.WriteFile(filepath.Join(folder, file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	url := testserver.Start(t, built, filepath.Join(dir, "data"),
		"--discover-interval", "1h", "--kernel-mirror", "file://"+filepath.Join(dir, "mirror"))
	client := api.NewClient(url, secret, nil)
	return runningServer{Binary: built, URL: url, Host: strings.TrimPrefix(url, "http://"), Client: client}
}

// publish does the steps that a builder does at the end of a build of this cell.
func (r runningServer) publish(t *testing.T, buildID, driver string) {
	t.Helper()
	b, err := r.Client.RequestBuild(t.Context(),
		api.BuildRequest{BuildID: buildID, Board: "lakitu", Driver: driver, Flavour: "proprietary"})
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(r.Host+"/prebake/driver:test-"+buildID, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := random.Image(1024, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img, remote.WithContext(t.Context()),
		remote.WithAuth(&authn.Basic{Username: "x", Password: secret})); err != nil {
		t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	kernel := target.Kernel{BuildID: buildID, Board: "lakitu", Release: "6.1.0-47-cos", Arch: target.AMD64}
	if _, err := r.Client.UpdateBuild(t.Context(), b.ID,
		api.BuildUpdate{State: api.Published, Digest: digest.String(), Kernel: &kernel,
			Fingerprint: target.Fingerprint("sha256:" + strings.Repeat("a", 64))}); err != nil {
		t.Fatal(err)
	}
}

// serverMetrics returns the metrics that a server exports, with the labels of each.
func serverMetrics(t *testing.T) map[string][]string {
	t.Helper()
	r := startServer(t)
	// Some metrics have series only after an event of their kind, so the test causes such events.
	r.publish(t, "17800.66.78", "535.261.03")
	if _, err := r.Client.Resolve(t.Context(),
		api.Question{BuildID: "17800.66.78", Board: "lakitu", Driver: "535.261.03"}); err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.URL+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	known := map[string][]string{}
	for name, family := range families {
		has := []string{"namespace", "job", "instance", "node"} // Prometheus adds these labels
		for _, l := range family.GetMetric()[0].GetLabel() {
			has = append(has, l.GetName())
		}
		known[name] = has
		if family.GetMetric()[0].GetHistogram() != nil {
			known[name+"_bucket"], known[name+"_sum"], known[name+"_count"] = append(has, "le"), has, has
		}
	}
	return known
}
