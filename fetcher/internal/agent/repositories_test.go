package agent_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// answers starts a web server that answers each request with this status and an HTML page, as the login page of a
// network does. It returns the address as a repository.
func answers(t *testing.T, status int) string {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(status)
		_, _ = w.Write([]byte("<html>log in to this network</html>"))
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://") + "/prebake/driver"
}

// blobOf returns the path of a blob's file in an OCI image layout.
func blobOf(lay, digest string) string {
	return filepath.Join(strings.TrimPrefix(lay, "oci:"), "blobs/sha256", strings.TrimPrefix(digest, "sha256:"))
}

// TestNextRepository checks that a node reads an artifact from a configured registry if the repository that the server
// names fails.
func TestNextRepository(t *testing.T) {
	t.Parallel()
	key, stranger := testkit.NewKey(t), testkit.NewKey(t)
	c := sample.NewCell(t, buildA, newVersion)
	mirror := layout(t)
	p := sample.Publish(t, mirror, key, c)
	for name, first := range map[string]func(t *testing.T) string{
		"away":             func(*testing.T) string { return "127.0.0.1:1/x" },
		"a login page":     func(t *testing.T) string { return answers(t, http.StatusOK) },
		"blocked":          func(t *testing.T) string { return answers(t, http.StatusForbidden) },
		"lacks everything": func(t *testing.T) string { return testkit.Registry(t, true) + "/prebake/driver" },
		"no valid statements": func(t *testing.T) string {
			lay := layout(t)
			sample.Publish(t, lay, stranger, c)
			return lay
		},
		"a damaged layer": func(t *testing.T) string {
			lay := layout(t)
			file := blobOf(lay, sample.Publish(t, lay, key, c).Layers[1].Digest)
			raw, err := os.ReadFile(file)
			if err == nil {
				err = os.WriteFile(file, flip(raw, 0.5), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
			return lay
		},
		"a missing layer": func(t *testing.T) string {
			lay := layout(t)
			if err := os.Remove(blobOf(lay, sample.Publish(t, lay, key, c).Layers[0].Digest)); err != nil {
				t.Fatal(err)
			}
			return lay
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, c, 1, key)
			ref := first(t)
			var log bytes.Buffer
			n.parts.Log = slog.New(slog.NewTextHandler(&log, nil))
			n.parts.Registries = []string{ref, mirror}
			r, err := n.run(t, ref, p.Digest, c.Driver)
			if err != nil || r.Verdict.Digest != p.Digest || !strings.Contains(log.String(), "repository="+ref) {
				t.Errorf("Run = %+v, %v; want the driver of the mirror, and %s in the log:\n%s", r.Verdict, err, ref, &log)
			}
			if left := n.leftovers(t); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// TestWebPageIsNoSuccess checks runs on a node whose driver works. If the server does not answer, a run may succeed. If
// a web page or wrong bytes come instead of the server's answer, a run must fail, so that the node asks again. The
// driver must stay ready in each case.
func TestWebPageIsNoSuccess(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	n.cfg.Wish = "R535"
	if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
		t.Fatal(err)
	}
	away := fault.New(fault.Transient, "no answer", "log in")
	for _, row := range []struct {
		none    error
		kind    fault.Kind
		excused bool
	}{
		{away, fault.Transient, true},
		{fault.New(fault.WebPage, "no answer", "log in"), fault.WebPage, false},
		{errors.Join(away, resolve.OtherService(fault.New(fault.Unverified, "wrong bytes", ""), "log in")),
			fault.Transient, false},
	} {
		n.parts.Finder = finder{err: row.none}
		r, err := n.runAs(t)
		if (err == nil) != row.excused || err != nil && !fault.Is(err, row.kind) || r.Verdict.State != gpucheck.Ready {
			t.Errorf("Run with %v = %s, %v; want ready, excused: %t", row.none, r.Verdict.State, err, row.excused)
		}
	}
}

// TestNextRepositoryFails checks that the error names each repository that the node tried. It also checks that the node
// does not search the registries for an artifact that it compiled itself.
func TestNextRepositoryFails(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	c := sample.NewCell(t, buildA, newVersion)
	mirror, empty := layout(t), layout(t)
	p := sample.Publish(t, mirror, key, c)
	n := newNode(t, c, 1, key)
	n.parts.Registries = []string{empty}
	_, err := n.run(t, "127.0.0.1:1/x", p.Digest, c.Driver)
	if !fault.Is(err, fault.Transient) || !strings.Contains(err.Error(), "127.0.0.1:1/x") ||
		!strings.Contains(err.Error(), empty) {
		t.Errorf("Run = %v; want transient with both repositories", err)
	}
	n.parts.Registries = []string{mirror}
	n.parts.NodeVerifier = func() (agent.Verifier, error) { return key.Verifier(t), nil }
	n.parts.Finder = finder{answer: resolve.Answer{
		State: api.Published, Source: resolve.SourceNode, Driver: c.Driver, Repository: empty, Digest: p.Digest,
	}}
	if _, err := n.runAs(t); !fault.Is(err, fault.NoArtifact) {
		t.Errorf("Run of a node's own artifact that is gone = %v; want no artifact", err)
	}
}

// withoutProvenance is a repository that does not serve the statements about the build (provenance).
type withoutProvenance struct {
	agent.Repository
	v *trust.Verifier
}

func (w withoutProvenance) AttachedIf(ctx context.Context, digest, artifactType string, useful func([]byte) string,
	wanted ...map[string]string) ([][]byte, error) {
	all, err := w.Repository.AttachedIf(ctx, digest, artifactType, useful, wanted...)
	return slices.DeleteFunc(all, func(b []byte) bool {
		st, err := w.v.Statement(b)
		return err == nil && st.PredicateType == trust.PredicateProvenance
	}), err
}

// reject attaches a signed statement that the driver failed its load test.
func reject(t *testing.T, ref, digest string, key *testkit.Key, c sample.Cell) {
	t.Helper()
	attachTest(t, ref, digest, key, c, false)
}

// attachTest attaches a signed result of a load test. If passed is false, the kernel rejected the driver.
func attachTest(t *testing.T, ref, digest string, key *testkit.Key, c sample.Cell, passed bool) {
	t.Helper()
	repo, err := registry.Open(ref, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := repo.Resolve(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	r := trust.TestResult{Result: "FAILED", LoadTest: trust.LoadTest{
		Verdict: trust.VerdictRejected, Reason: "unknown symbol", Kernel: c.Kernel, Fingerprint: c.Fingerprint}}
	if passed {
		r.Result, r.LoadTest.Verdict, r.LoadTest.Reason = "PASSED", trust.VerdictLoaded, ""
	}
	statement := key.Statement(t, digest, trust.PredicateTestResult, r)
	if _, err := repo.Attach(t.Context(), d, trust.ArtifactTypeBundle, statement, nil); err != nil {
		t.Fatal(err)
	}
}

// TestNextRepositoryKeepsRefusals checks that a refusal counts even if its repository cannot be used. The first
// repository has the statement that the driver failed its load test, but no provenance. The mirror is older and lacks
// that statement. The node must not load the driver.
func TestNextRepositoryKeepsRefusals(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	c := sample.NewCell(t, buildA, newVersion)
	named, mirror := layout(t), layout(t)
	p := sample.Publish(t, named, key, c)
	sample.Publish(t, mirror, key, c)
	reject(t, named, p.Digest, key, c)
	n := newNode(t, c, 1, key)
	n.parts.Registries = []string{mirror}
	open := n.parts.Open
	n.parts.Open = func(ref string) (agent.Repository, error) {
		r, err := open(ref)
		if ref == named && err == nil {
			return withoutProvenance{r, key.Verifier(t)}, nil
		}
		return r, err
	}
	r, err := n.run(t, named, p.Digest, c.Driver)
	if err == nil || !strings.Contains(err.Error(), "rejected in the load test") || len(n.kernel.calls) > 0 {
		t.Errorf("Run = %+v, %v; want the refusal of the first repository", r.Verdict, err)
	}
}

// withJunk is a repository that adds more than 16 MiB of data that is no statement. 16 MiB is the node's limit for all
// statements of an artifact.
type withJunk struct{ agent.Repository }

func (w withJunk) AttachedIf(ctx context.Context, digest, artifactType string, useful func([]byte) string,
	wanted ...map[string]string) ([][]byte, error) {
	all, err := w.Repository.AttachedIf(ctx, digest, artifactType, useful, wanted...)
	for i := range 15 {
		all = append(all, bytes.Repeat([]byte{byte(i)}, 1<<20))
	}
	for i := range 5000 { // small payloads use up the rest of the limit
		all = append(all, fmt.Appendf(nil, "%-256d", i))
	}
	return all, err
}

// TestNextRepositoryWithJunk checks two repositories that serve too much data that is no statement. The node must still
// read the statements of both: the result of the load test from the first one, and the provenance from the second one.
func TestNextRepositoryWithJunk(t *testing.T) {
	t.Parallel()
	for _, refused := range []bool{true, false} {
		key := testkit.NewKey(t)
		c := sample.NewCell(t, buildA, newVersion)
		named, mirror := layout(t), layout(t)
		p := sample.Publish(t, named, key, c)
		sample.Publish(t, mirror, key, c)
		if refused {
			reject(t, named, p.Digest, key, c)
		}
		n := newNode(t, c, 1, key)
		n.parts.Registries = []string{mirror}
		open := n.parts.Open
		n.parts.Open = func(ref string) (agent.Repository, error) {
			r, err := open(ref)
			if err == nil && ref == named {
				r = withoutProvenance{r, key.Verifier(t)}
			}
			return withJunk{r}, err
		}
		r, err := n.run(t, named, p.Digest, c.Driver)
		if refused && (err == nil || !strings.Contains(err.Error(), "rejected in the load test")) {
			t.Errorf("Run = %+v, %v; want the refusal of the first repository", r.Verdict, err)
		}
		if !refused && (err != nil || r.Verdict.Digest != p.Digest) {
			t.Errorf("Run = %+v, %v; want the driver", r.Verdict, err)
		}
	}
}
