package tarball_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/distribution"
	"github.com/prebake/prebake/pkg/trust"
)

// TestAnotherRegistry publishes an artifact twice in Debian's docker-registry, which has no referrers API. Then it
// publishes another artifact for the same cell, which Publish must refuse.
func TestAnotherRegistry(t *testing.T) {
	t.Parallel()
	host := distribution.Start(t)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet,
		"http://"+host+"/v2/prebake/driver/referrers/sha256:"+strings.Repeat("0", 64), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if _ = resp.Body.Close(); resp.StatusCode != http.StatusNotFound {
		t.Fatalf("GET referrers = %s; this test wants a registry without them", resp.Status)
	}
	repo, err := registry.Open(host+"/prebake/driver", registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	key := testkit.NewKey(t)
	release := func(salt string) (testkit.Sample, publish.Artifact) {
		s := testkit.NewSample(t, key, testkit.SampleKernel("47"), open, salt)
		return s, publish.Artifact{Image: s.Image, Identity: s.Identity, Kernel: s.Kernel, Bundles: s.Bundles,
			Verifier: key.Verifier(t)}
	}
	s, a := release("")
	ctx := t.Context()
	state := func() [2]string {
		var got [2]string
		for i, tag := range []string{bundle.Tag(s.Identity), bundle.KernelTag(s.Kernel, open)} {
			d, err := repo.Resolve(ctx, tag)
			if err != nil {
				t.Fatal(err)
			}
			got[i] = d.Digest.String()
		}
		attached, err := repo.Attached(ctx, s.Digest, trust.ArtifactTypeBundle)
		if err != nil || len(attached) != 2 {
			t.Errorf("Attached = %d bundles, %v; want 2", len(attached), err)
		}
		if _, err := key.Verifier(t).Verify(attached, s.Expect()); err != nil {
			t.Errorf("Verify = %v", err)
		}
		return got
	}
	if digest, existed, err := publish.Publish(ctx, repo, a); err != nil || existed || digest != s.Digest {
		t.Fatalf("Publish = %s, %v, %v; want %s, new", digest, existed, err, s.Digest)
	}
	first := state()
	if digest, existed, err := publish.Publish(ctx, repo, a); err != nil || !existed || digest != s.Digest {
		t.Errorf("Publish again = %s, %v, %v; want %s, existed", digest, existed, err, s.Digest)
	}
	if got := state(); got != first {
		t.Errorf("tags = %v; were %v", got, first)
	}
	other, b := release("salt")
	if _, _, err := publish.Publish(ctx, repo, b); !fault.Is(err, fault.PublishRefused) || fault.Hint(err) == "" {
		t.Errorf("Publish(other bytes) = %v; want publish refused with a hint", err)
	}
	if _, err := repo.Resolve(ctx, other.Digest); !fault.Is(err, fault.NoArtifact) {
		t.Errorf("Resolve(refused artifact) = %v; want that nothing of it was sent", err)
	}
	if got := state(); got != first {
		t.Errorf("tags = %v; were %v", got, first)
	}
}
