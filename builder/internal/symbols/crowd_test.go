package symbols_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/builder/internal/symbols"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
)

// listing changes the lists of what is attached, by the digest of their subject.
type listing map[string]func(list *v1.IndexManifest)

func (l listing) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := http.DefaultTransport.RoundTrip(r)
	_, subject, _ := strings.Cut(r.URL.Path, "/referrers/")
	if err != nil || l[subject] == nil || resp.StatusCode != http.StatusOK {
		return resp, err
	}
	var list v1.IndexManifest
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
		return nil, err
	}
	l[subject](&list)
	raw, err := json.Marshal(list)
	if err != nil {
		return nil, err
	}
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(raw)), int64(len(raw))
	return resp, nil
}

// TestHaveInCrowd checks that others who may push cannot hide the symbols of a builder from itself: neither by more
// junk than it reads, nor by junk whose list of statements is too long.
func TestHaveInCrowd(t *testing.T) {
	t.Parallel()
	ref := testkit.Registry(t, true) + "/prebake/driver"
	_, sample, subject := pushSample(t, ref)
	signer := newSigner(t)
	own := map[string][]string{}
	remembers := registry.Options{
		Attached: func(subject, digest string) { own[subject] = append(own[subject], digest) },
		Own:      func(subject string) []string { return own[subject] },
	}
	mine, err := registry.Open(ref, remembers)
	if err != nil {
		t.Fatal(err)
	}
	d, _, err := symbols.Publish(t.Context(), mine, sample.Digest, newSet(t, sample.Identity, signer, 1))
	if err != nil {
		t.Fatal(err)
	}
	many := func(list *v1.IndexManifest) {
		for i := range 1100 { // their digests come first, and nobody has them
			junk := list.Manifests[0]
			junk.Digest.Hex = fmt.Sprintf("%064d", i)
			list.Manifests = append(list.Manifests, junk)
		}
	}
	remembers.Transport = listing{sample.Digest: many}
	repo, err := registry.Open(ref, remembers)
	if err != nil {
		t.Fatal(err)
	}
	have(t, repo, sample.Digest, signer, true, "beside much junk")

	var junk v1.Descriptor
	for i := 0; junk.Digest.Hex == "" || junk.Digest.Hex > d.Digest.Hex; i++ { // it is read before the signer's
		payload := fmt.Appendf(nil, "junk %d", i)
		layer := v1.Descriptor{MediaType: bundle.MediaTypeLayer}
		if layer.Digest, layer.Size, err = v1.SHA256(bytes.NewReader(payload)); err != nil {
			t.Fatal(err)
		}
		if junk, err = mine.AttachLayer(t.Context(), subject, symbols.ArtifactType, layer,
			func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(payload)), nil }, nil); err != nil {
			t.Fatal(err)
		}
	}
	long := func(list *v1.IndexManifest) { list.Annotations = map[string]string{"a": strings.Repeat("x", 33<<20)} }
	if repo, err = registry.Open(ref, registry.Options{Transport: listing{junk.Digest.String(): long}}); err != nil {
		t.Fatal(err)
	}
	have(t, repo, sample.Digest, signer, true, "beside junk with a long list")
}
