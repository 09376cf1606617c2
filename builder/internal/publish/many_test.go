package publish_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// TestManyKernels has an artifact with more kernel matches than a client reads. A node of each COS build must find its
// own match and the provenance, even beside old statements without labels. No statement may be attached twice.
func TestManyKernels(t *testing.T) {
	t.Parallel()
	const most, old = 200, 40
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	kernel := func(i int) target.Kernel {
		k := s.Kernel
		k.BuildID = fmt.Sprintf("17800.%d.0", i)
		return k
	}
	var matches [][]byte
	for i := range most {
		matches = append(matches,
			key.KernelMatch(t, s.Digest, trust.KernelMatch{Kernel: kernel(i), Fingerprint: s.Identity.Fingerprint}))
	}
	for name, ref := range places(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			all := most
			if name == "layout" {
				all = registry.MaxAttachments + old // fewer, because a layout syncs each attachment to disk
			}
			repo := open(t, ref, nil)
			before := s
			before.Bundles = slices.Concat(s.Bundles[:1], matches[:old])
			before.Publish(t, repo)

			now := artifact(t, key, s)
			now.Bundles = slices.Concat(s.Bundles[:1], matches[:all])
			if _, _, err := publish.Publish(t.Context(), repo, now); err != nil {
				t.Fatal(err)
			}
			list, err := repo.Referrers(t.Context(), s.Digest, trust.ArtifactTypeBundle)
			if err != nil || len(list) != 1+all {
				t.Errorf("%d statements attached, %v; want the provenance and %d matches, each once", len(list), err, all)
			}
			for i := 0; i < all; i += 8 { // some of these kernel matches have labels, and some have none
				k := kernel(i)
				bundles, err := repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle, trust.Wanted(k)...)
				if err != nil {
					t.Fatal(err)
				}
				e := s.Expect()
				e.Kernel = k
				if _, err := key.Verifier(t).Verify(bundles, e); err != nil {
					t.Errorf("Verify for %s = %v", k, err)
				}
				if few := 2 + old + 1; len(bundles) > few {
					t.Errorf("%d statements are read for %s; want at most %d", len(bundles), k, few)
				}
			}
			k := target.Kernel{BuildID: "17801.0.0", Board: "lakitu"}
			again := artifact(t, key, s)
			again.Kernel = k
			again.Bundles = [][]byte{key.KernelMatch(t, s.Digest,
				trust.KernelMatch{Kernel: k, Fingerprint: s.Identity.Fingerprint})}
			again.Log = nil
			for range 2 {
				if err := publish.Attest(t.Context(), repo, s.Digest, again); err != nil {
					t.Fatal(err)
				}
			}
			if list, err := repo.Referrers(t.Context(), s.Digest, trust.ArtifactTypeBundle); err != nil || len(list) != 2+all {
				t.Errorf("%d statements attached, %v; want %d", len(list), err, 2+all)
			}
		})
	}
	if trust.MaxBundles < 2*registry.MaxAttachments {
		t.Errorf("a client reads %d statements, but a verifier examines only %d of them", 2*registry.MaxAttachments,
			trust.MaxBundles)
	}
}
