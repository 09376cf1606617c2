package agent_test

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// denies starts a proxy for a registry, and returns the proxy's host. For one digest, the proxy answers with status
// 403, as a filter in a company's network may do.
func denies(t *testing.T, behind, digest string) string {
	t.Helper()
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: behind})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/"+digest) {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// plain opens a repository without TLS.
func plain(t *testing.T, ref string) *registry.Repository {
	t.Helper()
	repo, err := registry.Open(ref, registry.Options{Plain: true})
	if err != nil {
		t.Fatal(err)
	}
	return repo
}

// publishLabelled publishes the artifact of a cell with the result of a load test, and returns the artifact's digest.
// If labels is true, each attachment has the annotations that a builder writes, such as the statement's type.
func publishLabelled(t *testing.T, ref string, key *testkit.Key, c sample.Cell, r trust.TestResult,
	labels bool) (digest string) {
	t.Helper()
	lay := layout(t)
	digest = sample.Publish(t, lay, key, c).Digest
	from, to := plain(t, lay), plain(t, ref)
	if _, err := registry.Copy(t.Context(), from, to, digest, func(v1.Descriptor) bool { return false }); err != nil {
		t.Fatal(err)
	}
	statements, err := from.Attached(t.Context(), digest, trust.ArtifactTypeBundle)
	if err != nil {
		t.Fatal(err)
	}
	subject, err := to.Resolve(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range append(statements, key.Statement(t, digest, trust.PredicateTestResult, r)) {
		var of map[string]string
		if labels {
			st, err := key.Verifier(t).Statement(b)
			if err != nil {
				t.Fatal(err)
			}
			of = trust.Labels(st)
		}
		if _, err := to.Attach(t.Context(), subject, trust.ArtifactTypeBundle, b, of); err != nil {
			t.Fatal(err)
		}
	}
	return digest
}

// TestDeniedStatement checks a registry that lists a statement, but answers with status 403 for the statement itself.
// If that statement may refuse the driver, the node may load the driver only if a mirror serves the statement. Any
// other statement is not needed for this decision.
func TestDeniedStatement(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	c := sample.NewCell(t, buildA, newVersion)
	result := func(passed bool) trust.TestResult {
		r := trust.TestResult{Result: "FAILED", LoadTest: trust.LoadTest{
			Verdict: trust.VerdictRejected, Reason: "unknown symbol", Kernel: c.Kernel, Fingerprint: c.Fingerprint}}
		if passed {
			r.Result, r.LoadTest.Verdict, r.LoadTest.Reason = "PASSED", trust.VerdictLoaded, ""
		}
		return r
	}
	const installed = ""
	for _, row := range []struct {
		name             string
		passed, labelled bool
		predicate        string // the type of the denied statement
		mirror           string // "" means no mirror; "lacks" and "has" say whether the mirror has the statement
		want             string // part of the error; installed means no error
		kind             fault.Kind
	}{
		{"a refusal", false, true, trust.PredicateTestResult, "", "may refuse the driver, and cannot be read", fault.Usage},
		{"a refusal without labels", false, false, trust.PredicateTestResult, "", "may refuse the driver", fault.Usage},
		{"a refusal that a mirror lacks", false, true, trust.PredicateTestResult, "lacks", "but does not serve", fault.Usage},
		{"a refusal that a mirror has", false, true, trust.PredicateTestResult, "has", "rejected in the load test",
			fault.Usage},
		{"a passed load test", true, true, trust.PredicateTestResult, "", installed, 0},
		{"the provenance", true, true, trust.PredicateProvenance, "", "denies 1 of the attachments", fault.Usage},
		{"the provenance, which a mirror has", true, true, trust.PredicateProvenance, "has", installed, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			const path = "/prebake/driver"
			named, mirror := testkit.Registry(t, true), testkit.Registry(t, true)
			digest := publishLabelled(t, named+path, key, c, result(row.passed), row.labelled)
			switch row.mirror {
			case "lacks":
				sample.Publish(t, mirror+path, key, c)
			case "has":
				if _, err := registry.Copy(t.Context(), plain(t, named+path), plain(t, mirror+path), digest, nil); err != nil {
					t.Fatal(err)
				}
			}
			denied := attachmentsOf(t, named+path, digest, row.predicate, key.Verifier(t), false)[0].Digest.String()
			n := newNode(t, c, 1, key)
			if row.mirror != "" {
				n.parts.Registries = []string{mirror + path}
			}
			r, err := n.run(t, denies(t, named, denied)+path, digest, c.Driver)
			if row.want == installed {
				if err != nil || r.Verdict.Digest != digest {
					t.Errorf("Run = %+v, %v; want the driver", r.Verdict, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), row.want) || !fault.Is(err, row.kind) || fault.Hint(err) == "" ||
				len(n.kernel.calls) > 0 {
				t.Errorf("Run = %+v, %v (%v, hint %q), with the calls %v; want %v with %q, and no call", r.Verdict, err,
					fault.Of(err), fault.Hint(err), n.kernel.calls, row.kind, row.want)
			}
		})
	}
}

// TestWrongLink checks a registry whose list of statements names a next page on another host. The node must not read
// that page. A refusal may be on that page, so the node must not load the driver. The error must name the wrong header.
func TestWrongLink(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	c := sample.NewCell(t, buildA, newVersion)
	named, mirror := testkit.Registry(t, true), layout(t)
	p := sample.Publish(t, named+"/prebake/driver", key, c)
	sample.Publish(t, mirror, key, c)
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: named})
	proxy.ModifyResponse = func(resp *http.Response) error {
		if strings.Contains(resp.Request.URL.Path, "/referrers/") {
			resp.Header.Set("Link", "<http://registry.internal:5000"+resp.Request.URL.Path+`?n=2>; rel="next"`)
		}
		return nil
	}
	srv := httptest.NewServer(proxy)
	t.Cleanup(srv.Close)
	n := newNode(t, c, 1, key)
	n.parts.Registries = []string{mirror}
	r, err := n.run(t, strings.TrimPrefix(srv.URL, "http://")+"/prebake/driver", p.Digest, c.Driver)
	if err == nil || !strings.Contains(err.Error(), "wrong Link header: the next page") ||
		!strings.Contains(err.Error(), "served only a part of its list of statements") ||
		!strings.Contains(fault.Hint(err), "so that the Link header names the next page") || len(n.kernel.calls) > 0 {
		t.Errorf("Run = %+v, %v, hint %q, with the calls %v; want the header named in both, and no call", r.Verdict, err,
			fault.Hint(err), n.kernel.calls)
	}
}
