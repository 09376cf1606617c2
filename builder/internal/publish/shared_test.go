package publish_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// overwrite removes one statement from the list of attachments under the tag, as another builder does that read the
// list before the entry was there. It never removes the log, after whose loss the publisher does not look again.
func overwrite(t *testing.T, ref, digest string, entry int) {
	t.Helper()
	tag, err := name.ParseReference(ref+":"+strings.Replace(digest, ":", "-", 1), name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	list, err := remote.Index(tag)
	if err != nil {
		t.Fatal(err)
	}
	m, err := list.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	statements := slices.DeleteFunc(slices.Clone(m.Manifests),
		func(d v1.Descriptor) bool { return d.ArtifactType == publish.ArtifactTypeLog })
	if len(statements) < 2 {
		t.Fatalf("list of attachments = %+v; want two statements or more", m)
	}
	lost := statements[entry%len(statements)].Digest
	list = mutate.RemoveManifests(list, func(d v1.Descriptor) bool { return d.Digest == lost })
	if err := remote.Put(tag, list); err != nil {
		t.Fatal(err)
	}
}

// Without the referrers API, a publisher attaches again what another builder's write has removed from the list.
func TestSharedList(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	for _, row := range []struct {
		name   string
		api    bool
		losses int // pauses in which an entry is lost
		pauses int // in all
	}{
		{"referrers API", true, 0, 0},
		{"nothing lost", false, 0, 2},
		{"each entry lost once", false, 3, 5},
		{"one lost each time", false, 100, 10},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			ref := testkit.Registry(t, row.api) + "/prebake/driver"
			pauses := 0
			a := artifact(t, key, s)
			a.Pause = func(context.Context) error {
				if pauses++; pauses <= row.losses {
					overwrite(t, ref, s.Digest, (pauses-1)%3)
				}
				return nil
			}
			repo := open(t, ref, nil)
			_, _, err := publish.Publish(t.Context(), repo, a)
			if row.losses == 100 {
				if !fault.Is(err, fault.Transient) || fault.Hint(err) == "" || pauses != row.pauses {
					t.Errorf("Publish = %v after %d pauses; want that it gives up after %d", err, pauses, row.pauses)
				}
				return
			}
			if err != nil || pauses != row.pauses {
				t.Errorf("Publish = %v after %d pauses; want %d", err, pauses, row.pauses)
			}
			check(t, repo, key, s, 2)
		})
	}
}
