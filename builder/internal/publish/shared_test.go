package publish_test

import (
	"context"
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

// overwrite removes one entry from the list of attachments under the tag, as another builder does that read the list
// before the entry was there.
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
	if err != nil || entry >= len(m.Manifests) {
		t.Fatalf("list of attachments = %+v, %v; want more than %d entries", m, err, entry)
	}
	lost := m.Manifests[entry].Digest
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
			// The publisher does not wait for an entry that is lost after its last look, so the order of entries counts.
			if least := min(row.pauses, 2+max(0, row.losses-2)); err != nil || pauses < least || pauses > row.pauses {
				t.Errorf("Publish = %v after %d pauses; want %d to %d", err, pauses, least, row.pauses)
			}
			check(t, repo, key, s, 2)
		})
	}
}
