package publish_test

import (
	"math/rand/v2"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
)

// code returns random data, which does not compress. All sibling kernels' modules of these tests contain it.
func code() string {
	b := make([]byte, 200_000)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b) // Read never returns an error
	return string(b)
}

// publishBuild publishes a sample for the COS build 17800.0.number.
func publishBuild(t *testing.T, repo *registry.Repository, key *testkit.Key, number, salt string) testkit.Sample {
	t.Helper()
	s := testkit.NewSample(t, key, testkit.SampleKernel(number), driver, salt)
	if _, _, err := publish.Publish(t.Context(), repo, artifact(t, key, s)); err != nil {
		t.Fatal(err)
	}
	return s
}

// builds makes deltas to the sample, and returns the BUILD_IDs from which they lead.
func builds(t *testing.T, repo *registry.Repository, s testkit.Sample, count int) []string {
	t.Helper()
	made, err := publish.Deltas(t.Context(), repo, s.Digest, s.Kernel, driver, count)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, d := range made {
		if ids = append(ids, d.From.BuildID); d.Size > 5000 {
			t.Errorf("the delta from %s has %d bytes", d.From, d.Size)
		}
	}
	return ids
}

func TestDeltas(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	for name, ref := range places(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			repo := open(t, ref, nil)
			id := func(number string) string { return testkit.SampleKernel(number).BuildID }
			for _, number := range []string{"9", "47", "48", "60"} {
				publishBuild(t, repo, key, number, code()+number)
			}
			// Build 49 has the same kernel as build 48. The layer of build 40 has nothing in common with the other layers.
			again := testkit.NewSample(t, key, testkit.SampleKernel("48"), driver, code()+"48")
			again.Kernel.BuildID = id("49")
			if _, _, err := publish.Publish(t.Context(), repo, artifact(t, key, signAgain(t, key, again))); err != nil {
				t.Fatal(err)
			}
			publishBuild(t, repo, key, "40", "short")

			s := publishBuild(t, repo, key, "50", code()+"fifty")
			if diff := cmp.Diff([]string{id("49"), id("47")}, builds(t, repo, s, 2)); diff != "" {
				t.Errorf("deltas (-want +got):\n%s", diff)
			}
			// Deltas must skip a delta that exists already, and a delta that would save little.
			if diff := cmp.Diff([]string{id("9")}, builds(t, repo, s, 4)); diff != "" {
				t.Errorf("deltas of a second call (-want +got):\n%s", diff)
			}
			if got := builds(t, repo, s, 0); got != nil {
				t.Errorf("Deltas(0) = %q", got)
			}

			// A node that has the layer of build 47 applies the delta, and must get the layer of build 50.
			former := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, code()+"47").Layers[0]
			layer := s.Layers[0]
			found, err := repo.Payloads(
				t.Context(),
				s.Digest,
				bundle.ArtifactTypeDelta,
				layer.Size,
				map[string]string{bundle.AnnotationDeltaFrom: former.DiffID},
			)
			if err != nil || len(found) != 1 {
				t.Fatalf("Payloads = %v, %v; want one", found, err)
			}
			rc, err := repo.Blob(t.Context(), found[0].Digest.String(), found[0].Size)
			if err != nil {
				t.Fatal(err)
			}
			defer rc.Close()
			packed, err := os.Open(former.Path)
			if err != nil {
				t.Fatal(err)
			}
			defer packed.Close()
			from, err := bundle.OpenArchive(packed)
			if err != nil {
				t.Fatal(err)
			}
			defer from.Close()
			dst, err := os.OpenRoot(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer dst.Close()
			if err := bundle.UnpackDelta(t.Context(), rc, found[0].Digest.String(), found[0].Size, from, layer.DiffID,
				dst); err != nil {
				t.Error(err)
			}
		})
	}
}
