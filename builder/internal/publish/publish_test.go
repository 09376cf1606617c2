package publish_test

import (
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

var driver = target.Driver{Version: "535.261.03", Flavour: target.Open}

func open(t testing.TB, ref string, tr http.RoundTripper) *registry.Repository {
	t.Helper()
	r, err := registry.Open(ref, registry.Options{Transport: tr})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func places(t testing.TB) map[string]string {
	return map[string]string{
		"registry with referrers":    testkit.Registry(t, true) + "/prebake/driver",
		"registry without referrers": testkit.Registry(t, false) + "/prebake/driver",
		"layout":                     "oci:" + filepath.Join(t.TempDir(), "l"),
	}
}

func artifact(t testing.TB, key *testkit.Key, s testkit.Sample) publish.Artifact {
	t.Helper()
	return publish.Artifact{Image: s.Image, Identity: s.Identity, Kernel: s.Kernel, Bundles: s.Bundles,
		Verifier: key.Verifier(t), Log: []byte("log of this build\n")}
}

// signAgain returns the sample with new signatures of the same statements, as from a second build.
func signAgain(t testing.TB, key *testkit.Key, s testkit.Sample) testkit.Sample {
	t.Helper()
	s.Bundles = [][]byte{
		key.Provenance(t, s.Digest, trust.Parameters{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint, Driver: driver}),
		key.KernelMatch(t, s.Digest, trust.KernelMatch{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint}),
	}
	return s
}

// check fails the test if the repository does not have this sample with this number of statements.
func check(t testing.TB, repo *registry.Repository, key *testkit.Key, s testkit.Sample, bundles int) {
	t.Helper()
	for _, tag := range []string{bundle.Tag(s.Identity), bundle.KernelTag(s.Kernel, driver)} {
		if got, ok, err := publish.Existing(t.Context(), repo, tag); err != nil || !ok || got != s.Digest {
			t.Errorf("Existing(%s) = %s, %v, %v; want %s", tag, got, ok, err, s.Digest)
		}
	}
	attached, err := repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle)
	if err != nil || len(attached) != bundles {
		t.Errorf("Attached = %d bundles, %v; want %d", len(attached), err, bundles)
	}
	if _, err := key.Verifier(t).Verify(attached, s.Expect()); err != nil {
		t.Errorf("Verify = %v", err)
	}
	if logs, err := repo.Referrers(t.Context(), s.Digest, publish.ArtifactTypeLog); err != nil || len(logs) != 1 {
		t.Errorf("logs = %v, %v; want one", logs, err)
	}
}

func TestPublish(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	other := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "salt")
	for name, ref := range places(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, repo := t.Context(), open(t, ref, nil)
			if _, ok, err := publish.Existing(ctx, repo, bundle.Tag(s.Identity)); ok || err != nil {
				t.Fatalf("Existing before publishing = %v, %v", ok, err)
			}
			got, existed, err := publish.Publish(ctx, repo, artifact(t, key, s))
			if err != nil || existed || got != s.Digest {
				t.Fatalf("Publish = %s, %v, %v; want %s, new", got, existed, err, s.Digest)
			}
			check(t, repo, key, s, 2)

			again := artifact(t, key, signAgain(t, key, s))
			again.Log = []byte("log of another run\n")
			if got, existed, err := publish.Publish(ctx, repo, again); err != nil || !existed || got != s.Digest {
				t.Fatalf("Publish again = %s, %v, %v; want %s, existed", got, existed, err, s.Digest)
			}
			check(t, repo, key, s, 2)

			twin := s
			twin.Kernel.BuildID = "17800.1.47" // another COS build with the same kernel
			twin = signAgain(t, key, twin)
			if got, existed, err := publish.Publish(ctx, repo, artifact(t, key, twin)); err != nil || !existed ||
				got != s.Digest {
				t.Fatalf("Publish for another build = %s, %v, %v; want %s, existed", got, existed, err, s.Digest)
			}
			check(t, repo, key, s, 3)
			check(t, repo, key, twin, 3)

			if _, _, err := publish.Publish(ctx, repo, artifact(t, key, other)); !fault.Is(err, fault.PublishRefused) ||
				fault.Hint(err) == "" {
				t.Errorf("Publish(another digest) = %v; want publish refused with a hint", err)
			}
			if _, err := repo.Resolve(ctx, other.Digest); !fault.Is(err, fault.NoArtifact) {
				t.Errorf("Resolve(refused artifact) = %v; want that nothing of it was sent", err)
			}
			check(t, repo, key, s, 3)
		})
	}
}

// TestRenew checks when Publish attaches a second provenance: the run must have built the artifact again, and the
// newest provenance in the registry must be old.
func TestRenew(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	repo := open(t, testkit.Registry(t, true)+"/prebake/driver", nil)
	const day = 24 * time.Hour
	rows := []struct {
		name, finished string
		after          time.Duration
		statements     int // number of attached statements afterwards
	}{
		{"first", "2026-01-01T00:00:00Z", 30 * day, 2},
		{"not old yet", "2026-01-30T00:00:00Z", 30 * day, 2},
		{"old, but nothing was built", "2027-02-01T00:00:00Z", 0, 2},
		{"old, and built again", "2027-02-01T00:00:00Z", 30 * day, 3},
		{"the newest one counts", "2027-02-02T00:00:00Z", 30 * day, 3},
		{"by a wrong clock", "2099-01-01T00:00:00Z", 30 * day, 4},
		{"after a wrong clock", "2027-05-01T00:00:00Z", 30 * day, 5},
	}
	for _, row := range rows {
		p := testkit.ProvenancePredicate(trust.Parameters{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint,
			Driver: driver})
		p["runDetails"].(map[string]any)["metadata"] = map[string]any{"finishedOn": row.finished}
		a := artifact(t, key, signAgain(t, key, s))
		a.Bundles[0] = key.Statement(t, s.Digest, trust.PredicateProvenance, p)
		a.Log, a.RenewAfter = []byte("log of "+row.name), row.after
		if _, _, err := publish.Publish(t.Context(), repo, a); err != nil {
			t.Fatalf("%s: Publish = %v", row.name, err)
		}
		attached, err := repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle)
		logs, lerr := repo.Referrers(t.Context(), s.Digest, publish.ArtifactTypeLog)
		if err != nil || lerr != nil || len(attached) != row.statements || len(logs) != row.statements-1 {
			t.Errorf("%s: %d statements, %d logs, %v, %v; want %d statements, and a log for each provenance", row.name,
				len(attached), len(logs), err, lerr, row.statements)
		}
	}
}

// TestPublishBesideJunk attaches invalid statements to an artifact, as anybody with the right to push can. A second run
// must not attach its own statements again.
func TestPublishBesideJunk(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	repo := open(t, testkit.Registry(t, true)+"/prebake/driver", nil)
	count := func() int {
		list, err := repo.Referrers(t.Context(), s.Digest, trust.ArtifactTypeBundle)
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	if _, _, err := publish.Publish(t.Context(), repo, artifact(t, key, s)); err != nil {
		t.Fatal(err)
	}
	testkit.AttachJunk(t, repo, s.Digest, trust.PredicateProvenance)
	before := count()
	if _, _, err := publish.Publish(t.Context(), repo, artifact(t, key, signAgain(t, key, s))); err != nil {
		t.Fatal(err)
	}
	if after := count(); after != before {
		t.Errorf("the second run attached %d statements; want none", after-before)
	}
}

func TestPublishRefusesForeignStatements(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	other := testkit.NewSample(t, key, testkit.SampleKernel("50"), driver, "")
	a := artifact(t, key, s)
	a.Bundles = other.Bundles
	repo := open(t, testkit.Registry(t, true)+"/x", nil)
	if _, _, err := publish.Publish(t.Context(), repo, a); err == nil {
		t.Error("Publish with statements about another artifact succeeded")
	}
	if _, ok, err := publish.Existing(t.Context(), repo, bundle.Tag(s.Identity)); ok || err != nil {
		t.Errorf("Existing = %v, %v; want no tag after a failed publish", ok, err)
	}
}

var errCut = errors.New("the machine lost its network")

// cutter passes n requests and fails all others. The first failed request still reaches the registry, and only the
// answer is lost. So the values of n lead to every state in which the registry can be left.
type cutter struct{ n atomic.Int64 }

func (c *cutter) RoundTrip(r *http.Request) (*http.Response, error) {
	left := c.n.Add(-1)
	if left >= 0 {
		return http.DefaultTransport.RoundTrip(r)
	}
	if left == -1 {
		if resp, err := http.DefaultTransport.RoundTrip(r); err == nil {
			_ = resp.Body.Close()
		}
	} else if r.Body != nil {
		_ = r.Body.Close()
	}
	return nil, errCut
}

// TestCutOffAnywhere fails the n-th request for every n. Nobody may find an incomplete artifact, and a second run must
// complete it.
func TestCutOffAnywhere(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	for _, referrers := range []bool{true, false} {
		t.Run(fmt.Sprintf("referrers=%v", referrers), func(t *testing.T) {
			t.Parallel()
			for n := int64(0); ; n++ {
				ref := testkit.Registry(t, referrers) + "/prebake/driver"
				c := &cutter{}
				c.n.Store(n)
				_, _, err := publish.Publish(t.Context(), open(t, ref, c), artifact(t, key, s))
				whole := open(t, ref, nil)
				if err == nil {
					if n < 20 {
						t.Errorf("Publish needed only %d requests; did the cut work?", n)
					}
					check(t, whole, key, s, 2)
					t.Logf("%d requests", n)
					return
				}
				if n > 500 {
					t.Fatalf("Publish still fails after %d requests: %v", n, err)
				}
				if !errors.Is(err, errCut) && !strings.Contains(err.Error(), errCut.Error()) && !fault.Is(err, fault.Transient) {
					t.Errorf("n=%d: Publish = %v; want the cause", n, err)
				}
				if _, ok, err := publish.Existing(t.Context(), whole, bundle.Tag(s.Identity)); err != nil {
					t.Errorf("n=%d: Existing = %v", n, err)
				} else if ok {
					// Publish writes the tag last, so the artifact of an existing tag must be complete.
					attached, err := whole.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle)
					if err != nil {
						t.Errorf("n=%d: Attached = %v", n, err)
					}
					if _, err := key.Verifier(t).Verify(attached, s.Expect()); err != nil {
						t.Errorf("n=%d: the tag is there, but Verify = %v", n, err)
					}
				}
				if _, _, err := publish.Publish(t.Context(), whole, artifact(t, key, signAgain(t, key, s))); err != nil {
					t.Errorf("n=%d: Publish again = %v", n, err)
				}
				check(t, whole, key, s, 2)
				if t.Failed() {
					return
				}
			}
		})
	}
}
