package registry_test

import (
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/registry"
)

// TestOwnAttachments checks that more attachments of others than a client reads do not hide those that a program
// attached itself. They hide those of a program that remembers none, so this test proves something.
func TestOwnAttachments(t *testing.T) {
	t.Parallel()
	const count = 1100 // more than one search reads
	label := map[string]string{"kind": "plan", "org.opencontainers.image.created": "2026-11-01T00:00:00Z"}
	for name, strip := range map[string]func(*v1.Descriptor){
		"typed": func(*v1.Descriptor) {},
		"untyped": func(d *v1.Descriptor) {
			d.ArtifactType, d.Annotations = "", nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			armed := atomic.Bool{}
			host := newPaged(t, func(page *v1.IndexManifest, h http.Header) {
				if !armed.Load() {
					return
				}
				for i := range count { // their digests come first, and nobody has them
					junk := page.Manifests[0]
					junk.Digest.Hex = fmt.Sprintf("%064d", i)
					junk.Annotations = map[string]string{"kind": "plan", "org.opencontainers.image.created": "2099-01-01T00:00:00Z"}
					page.Manifests = append(page.Manifests, junk)
				}
				for i := range page.Manifests {
					strip(&page.Manifests[i])
				}
			})
			own := map[string][]string{}
			remembers := openRef(t, host+"/own", registry.Options{
				Attached: func(subject, digest string) { own[subject] = append(own[subject], digest) },
				Own:      func(subject string) []string { return own[subject] },
			})
			subject := pushRandom(t, remembers, 64, 1)
			d, err := remembers.Attach(t.Context(), subject, labelledType, []byte("mine"), label)
			if err != nil {
				t.Fatal(err)
			}
			armed.Store(true)
			for repo, want := range map[*registry.Repository]int{remembers: 1, open(t, host+"/own"): 0} {
				all, err := repo.AttachedIf(t.Context(), subject.Digest.String(), labelledType,
					func(b []byte) string { return string(b) }, label)
				if err != nil || len(all) != want || want > 0 && string(all[0]) != "mine" {
					t.Errorf("AttachedIf = %q, %v; want %d", all, err, want)
				}
				list, err := repo.Referrers(t.Context(), subject.Digest.String(), labelledType)
				if first := len(list) > 0 && list[0].Digest == d.Digest; err != nil || first != (want > 0) {
					t.Errorf("Referrers = %d, %v; want the own one first: %t", len(list), err, want > 0)
				}
			}
		})
	}
}
