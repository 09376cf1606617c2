package agent

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// TestRequestsOfEvidence counts the HTTP requests with which a node reads the statements of an artifact. The artifact
// has one statement of each kind, as a builder publishes it. The node needs three of them: the provenance, the kernel
// match and the result of the load test.
func TestRequestsOfEvidence(t *testing.T) {
	t.Parallel()
	// These are the manifest, the config, the list of statements, and then a manifest and a payload for each of three
	// statements.
	const least = 3 + 3*2
	key := testkit.NewKey(t)
	for _, row := range []struct {
		name             string
		referrers, login bool
		site             bool
		want             int
	}{
		// The last request is for the build log: the test's registry lists it with a wrong artifact type, so the client must
		// read its manifest.
		{"registry", true, false, false, 1 + least + 1},
		{"registry with a login", true, true, false, 2 + least + 1},
		{"registry without the referrers API", false, false, false, 2 + least},
		{"site", false, false, true, 1 + least}, // the client reads the site's index first
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			s := testkit.NewSample(t, key, testkit.SampleKernel("47"),
				target.Driver{Version: "535.261.03", Flavour: target.Open}, "")
			var mu sync.Mutex
			var asked []string
			var serve http.Handler
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				asked = append(asked, r.Method+" "+r.URL.Path)
				mu.Unlock()
				switch {
				case r.URL.Path == "/token":
					_, _ = fmt.Fprint(w, `{"token":"t"}`) // fails only if the client has closed the connection
				case row.login && r.Header.Get("Authorization") != "Bearer t":
					w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token",service="test"`)
					w.WriteHeader(http.StatusUnauthorized)
				default:
					serve.ServeHTTP(w, r)
				}
			}))
			t.Cleanup(srv.Close)
			own, ref := "", strings.TrimPrefix(srv.URL, "http://")+"/prebake/driver"
			if row.site {
				dir := filepath.Join(t.TempDir(), "layout")
				own, ref, serve = "oci:"+dir, "oci:"+srv.URL, http.FileServer(http.Dir(dir))
			} else {
				behind := testkit.Registry(t, row.referrers)
				own = behind + "/prebake/driver"
				serve = httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: behind})
			}
			publishAll(t, own, key, s)
			repo, err := registry.Open(ref, registry.Options{Plain: true})
			if err != nil {
				t.Fatal(err)
			}
			v := key.Verifier(t)
			p, err := readEvidence(t.Context(), repo, v, s.Digest, &host.Facts{Kernel: s.Kernel})
			if err != nil || len(p.Bundles) != 3 {
				t.Fatalf("readEvidence = %d statements, %v; want 3", len(p.Bundles), err)
			}
			if _, err := v.Verify(p.Bundles, s.Expect()); err != nil {
				t.Error(err)
			}
			if len(asked) != row.want {
				t.Errorf("%d requests; want %d:\n%s", len(asked), row.want, strings.Join(asked, "\n"))
			}
		})
	}
}

// publishAll publishes an artifact with a build log and one statement of each kind. The statements have labels.
func publishAll(t *testing.T, ref string, key *testkit.Key, s testkit.Sample) {
	t.Helper()
	repo, err := registry.Open(ref, registry.Options{Plain: true})
	if err != nil {
		t.Fatal(err)
	}
	d, err := repo.Push(t.Context(), s.Image)
	if err != nil {
		t.Fatal(err)
	}
	passed := trust.TestResult{Result: "PASSED", LoadTest: trust.LoadTest{
		Verdict: trust.VerdictLoaded, Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint}}
	v := key.Verifier(t)
	for _, b := range append(s.Bundles, key.Statement(t, s.Digest, trust.PredicateTestResult, passed),
		key.Statement(t, s.Digest, trust.PredicateSBOM, map[string]string{"made": time.Now().String()}),
		key.Statement(t, s.Digest, gpulist.PredicateType, map[string]string{"made": time.Now().String()})) {
		st, err := v.Statement(b)
		if err == nil {
			_, err = repo.Attach(t.Context(), d, trust.ArtifactTypeBundle, b, trust.Labels(st))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := repo.Attach(t.Context(), d, "application/vnd.prebake.build-log.v1+zstd", []byte("log"), nil); err != nil {
		t.Fatal(err)
	}
}
