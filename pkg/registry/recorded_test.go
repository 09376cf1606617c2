package registry_test

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// Users of these registries recorded the responses in this file, and published them in issues. The comment of each test
// cites the issue. Fields that no client reads are left out.

// inProcess returns a transport that leads to a registry in this process, without a network. So a test can use a fake
// clock. If answer returns a response, it replaces the registry's.
func inProcess(referrers bool, answer func(r *http.Request) *http.Response) http.RoundTripper {
	handler := ggcr.New(ggcr.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)),
		ggcr.WithReferrersSupport(referrers))
	return transport(func(r *http.Request) (*http.Response, error) {
		if answer != nil {
			if resp := answer(r); resp != nil {
				return resp, nil
			}
		}
		w, got := httptest.NewRecorder(), r.Clone(r.Context())
		if got.Body == nil {
			got.Body = http.NoBody
		}
		handler.ServeHTTP(w, got)
		resp := w.Result()
		resp.Request = r
		return resp, nil
	})
}

type transport func(*http.Request) (*http.Response, error)

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) { return t(r) }

// TestRecordedGitLab checks GitLab, which has no referrers API. A request for the tag that should have the list of
// referrers returns the artifact itself (oras-project/oras-go#1396, 2026-09-05).
func TestRecordedGitLab(t *testing.T) {
	t.Parallel()
	s := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
	tag := strings.Replace(s.Digest, ":", "-", 1)
	raw, err := s.Image.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	tr := inProcess(false, func(r *http.Request) *http.Response {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/manifests/"+tag) {
			return nil
		}
		resp := reply(r, http.StatusOK, strings.NewReader(string(raw)),
			"application/vnd.docker.distribution.manifest.list.v2+json")
		resp.Header.Set("Docker-Content-Digest", s.Digest)
		return resp
	})
	repo, err := registry.Open("registry.example.com/group/x",
		registry.Options{Transport: tr, Username: "u", Password: "p"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Push(t.Context(), s.Image); err != nil {
		t.Fatal(err)
	}
	if got, err := repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle); err != nil || len(got) != 0 {
		t.Errorf("Attached = %d statements, %v; want none, and no error", len(got), err)
	}
	err = attachOne(t, repo, s)
	if fault.Of(err) != fault.PublishRefused || !strings.Contains(err.Error(), "as a digest") ||
		!strings.Contains(fault.Hint(err), "publish to another registry") {
		t.Errorf("Attach = %v (%v, hint %q); want it refused, and why", err, fault.Of(err), fault.Hint(err))
	}
}

// TestRecordedQuayCache checks Quay, whose lists of referrers come from a cache that is up to a minute old. So a list
// may lack a new referrer (quay/quay#6510, 2026-07-14).
func TestRecordedQuayCache(t *testing.T) {
	t.Parallel()
	s := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
	synctest.Test(t, func(t *testing.T) {
		const ttl = 60 * time.Second
		began := time.Now()
		var stale atomic.Int64
		tr := inProcess(true, func(r *http.Request) *http.Response {
			if !strings.Contains(r.URL.Path, "/referrers/") || time.Since(began) >= ttl {
				return nil
			}
			stale.Add(1)
			return reply(r, http.StatusOK,
				strings.NewReader(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`),
				"application/vnd.oci.image.index.v1+json")
		})
		repo, err := registry.Open("quay.example.com/x/y", registry.Options{Transport: tr, Username: "u", Password: "p"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := repo.Push(t.Context(), s.Image); err != nil {
			t.Fatal(err)
		}
		if err := attachOne(t, repo, s); err != nil {
			t.Errorf("Attach = %v after %v; want it to wait for the list", err, time.Since(began))
		}
		if stale.Load() == 0 || time.Since(began) < ttl {
			t.Errorf("%d answers out of the cache, %v: the test tried nothing", stale.Load(), time.Since(began))
		}
	})
}

// TestRecordedQuayUnknownManifest checks that Quay's answer 400 counts as an empty list. Quay sends it for the
// referrers of a manifest that it does not have (quay/quay#3071, 2024-07-23).
func TestRecordedQuayUnknownManifest(t *testing.T) {
	t.Parallel()
	tr := inProcess(true, func(r *http.Request) *http.Response {
		if !strings.Contains(r.URL.Path, "/referrers/") {
			return nil
		}
		return reply(r, http.StatusBadRequest,
			strings.NewReader(`{"errors":[{"code":"MANIFEST_INVALID","detail":{},"message":"manifest invalid"}]}`),
			"application/json")
	})
	repo, err := registry.Open("quay.example.com/x/y", registry.Options{Transport: tr, Username: "u", Password: "p"})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := repo.Attached(t.Context(), "sha256:"+strings.Repeat("0", 64), trust.ArtifactTypeBundle); err != nil ||
		len(got) != 0 {
		t.Errorf("Attached = %d, %v; want none", len(got), err)
	}
}

// TestRecordedRefusals checks how registries refuse a push:
//
//   - Harbor answers 401 to a user without rights, and also for a missing project (goharbor/harbor#13115, 2020-09-21).
//   - Amazon ECR answers 404 to a read from a missing repository (plexsystems/sinker#55, 2022-01-13).
//   - Amazon ECR closes the connection of an upload to a missing repository (aws/containers-roadmap#1970, 2023-03-06).
func TestRecordedRefusals(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		host   string
		status int // 0 means that the registry closes the connection
		body   string
		kind   fault.Kind
		hint   string
	}{
		"Harbor": {"harbor.example.com/library/maven", 401,
			`{"errors":[{"code":"UNAUTHORIZED","message":"unauthorized to access repository: library/maven, action: push: unauthorized to access repository: library/maven, action: push"}]}`,
			fault.PublishRefused, "check that the project exists"},
		"ECR": {"123456789012.dkr.ecr.us-east-1.amazonaws.com/coreos/prometheus-operator", 404,
			`{"errors":[{"code":"NAME_UNKNOWN","message":"The repository with name 'coreos/prometheus-operator' does not exist in the registry with id '123456789012'"}]}`,
			fault.PublishRefused, "aws ecr create-repository --repository-name coreos/prometheus-operator"},
		"ECR hangs up": {"123456789012.dkr.ecr.us-east-1.amazonaws.com/mirror/typoed-repository-name", 0, "",
			fault.Transient, "aws ecr create-repository --repository-name mirror/typoed-repository-name"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				tr := answer(func(r *http.Request) (*http.Response, error) {
					switch {
					case r.URL.Path == "/v2/":
						return reply(r, 200, strings.NewReader(""), ""), nil
					case r.Method == http.MethodPost && row.status == 0:
						return nil, io.EOF
					case r.Method == http.MethodPost:
						return reply(r, row.status, strings.NewReader(row.body), "application/json"), nil
					}
					return reply(r, 404, strings.NewReader("{}"), "application/json"), nil
				})
				repo, err := registry.Open(row.host, registry.Options{Transport: tr, Username: "u", Password: "p"})
				if err != nil {
					t.Fatal(err)
				}
				if err := repo.CheckPush(t.Context()); fault.Of(err) != row.kind || !strings.Contains(fault.Hint(err), row.hint) {
					t.Errorf("CheckPush = %v (%v, hint %q); want %v and %q", err, fault.Of(err), fault.Hint(err), row.kind, row.hint)
				}
			})
		})
	}
}
