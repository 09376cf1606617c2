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
	"github.com/prebake/prebake/pkg/trust"
)

// overwrite removes the log or a statement from the list of attachments under the tag. Another builder does the same if
// it read the list before the entry was there, and writes it afterwards. what is the log's artifact type or the
// statement's predicate type.
func overwrite(t *testing.T, ref, digest, what string) {
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
	isLost := func(d v1.Descriptor) bool {
		return d.ArtifactType == what || d.Annotations[trust.LabelPredicate] == what
	}
	if !slices.ContainsFunc(m.Manifests, isLost) {
		t.Fatalf("list of attachments = %+v; want %s among them", m, what)
	}
	list = mutate.RemoveManifests(list, isLost)
	if err := remote.Put(tag, list); err != nil {
		t.Fatal(err)
	}
}

// TestSharedList checks a registry without the referrers API, where builders overwrite each other's list of
// attachments. Publish must attach its entries again if another builder's write removed them.
func TestSharedList(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	const log, provenance, match = publish.ArtifactTypeLog, trust.PredicateProvenance, trust.PredicateKernelMatch
	for _, row := range []struct {
		name   string
		api    bool
		lost   []string // the entry that is removed in each pause of Publish; "" means none
		pauses int      // how many times Publish must pause
		fails  bool
	}{
		{"referrers API", true, nil, 0, false},
		{"nothing lost", false, nil, 2, false},
		{"each entry lost once", false, []string{log, provenance, match}, 5, false},
		{"log lost at the last look", false, []string{"", log}, 4, false},
		{"log lost twice", false, []string{match, log, log}, 5, false},
		{"statement lost each time", false, slices.Repeat([]string{match}, 10), 10, true},
		{"log lost each time", false, slices.Repeat([]string{log}, 10), 10, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			ref := testkit.Registry(t, row.api) + "/prebake/driver"
			pauses := 0
			a := artifact(t, key, s)
			a.Pause = func(context.Context) error {
				if pauses < len(row.lost) && row.lost[pauses] != "" {
					overwrite(t, ref, s.Digest, row.lost[pauses])
				}
				pauses++
				return nil
			}
			repo := open(t, ref, nil)
			_, _, err := publish.Publish(t.Context(), repo, a)
			if pauses != row.pauses {
				t.Errorf("Publish paused %d times; want %d", pauses, row.pauses)
			}
			if row.fails {
				if !fault.Is(err, fault.Transient) || fault.Hint(err) == "" {
					t.Errorf("Publish = %v; want a temporary error with a hint", err)
				}
				return
			}
			if err != nil {
				t.Errorf("Publish = %v; want the lost entries attached again", err)
			}
			check(t, repo, key, s, 2)
		})
	}
}
