package ocistore_test

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/server/internal/ocistore"
)

// TestPublicRegistry pushes images with an ordinary client. A public registry must say that it is public, and must
// accept only what its operator allows.
func TestPublicRegistry(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name              string
		public            bool
		says              bundle.Redistribution
		audience          string
		open, proprietary bool
	}{
		{"private", false, "", registry.AudiencePrivate, true, true},
		{"public", true, "", registry.AudiencePublic, false, false},
		{"public, user space goes", true, bundle.RedistributeUserspace, registry.AudiencePublic, true, false},
		{"public, all goes", true, bundle.RedistributeAll, registry.AudiencePublic, true, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			s := openWith(t, t.TempDir(), ocistore.Options{Public: row.public, Redistribute: row.says})
			host := listen(t, s)
			repo, err := registry.Open(host+"/prebake/driver", registry.Options{Username: "any", Password: token})
			if err != nil {
				t.Fatal(err)
			}
			if seen, err := repo.AnonymousAccess(t.Context(), ""); err != nil || seen.Visibility != row.audience ||
				!seen.Reads || seen.Host != host {
				t.Errorf("AnonymousAccess() = %+v, %v; want host %s that says %s", seen, err, host, row.audience)
			}
			resp, err := http.Get("http://" + host + "/v2/")
			if err != nil {
				t.Fatal(err)
			}
			_, err = io.Copy(io.Discard, resp.Body)
			if err = errors.Join(err, resp.Body.Close()); err != nil || resp.Header.Get("Prebake-Audience") != row.audience {
				t.Errorf("GET /v2/ says %q, %v; want %s", resp.Header.Get("Prebake-Audience"), err, row.audience)
			}
			for f, want := range map[target.Flavour]bool{target.Open: row.open, target.Proprietary: row.proprietary} {
				sample := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"),
					target.Driver{Version: "535.261.03", Flavour: f}, "")
				_, err := repo.Push(t.Context(), sample.Image)
				if (err == nil) != want || err != nil && !strings.Contains(err.Error(), "--redistribute") {
					t.Errorf("Push(%s) = %v; want taken %t, or a word about --redistribute", f, err, want)
				}
				if _, err := repo.Resolve(t.Context(), sample.Digest); (err == nil) != want {
					t.Errorf("Resolve(%s) after the push = %v; want there %t", f, err, want)
				}
			}
			// The registry accepts images that do not come from Prebake.
			if _, err := repo.Push(t.Context(), image(t)); err != nil {
				t.Errorf("Push(somebody's image) = %v; want none", err)
			}
		})
	}
}

// TestPublicRegistryReadsAllManifests checks that a public registry also refuses restricted content if the manifest is
// very long, or has unknown fields.
func TestPublicRegistryReadsAllManifests(t *testing.T) {
	t.Parallel()
	s := openWith(t, t.TempDir(), ocistore.Options{Public: true})
	host := listen(t, s)
	repo, err := registry.Open(host+"/prebake/driver", registry.Options{Username: "any", Password: token})
	if err != nil {
		t.Fatal(err)
	}
	foreign := image(t)
	if _, err := repo.Push(t.Context(), foreign); err != nil { // this pushes the blobs that the manifests below name
		t.Fatal(err)
	}
	sample := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"),
		target.Driver{Version: "535.261.03", Flavour: target.Proprietary}, "")
	unknown := func(raw string) string { return strings.Replace(raw, "{", `{"newField":{},`, 1) }
	padded := func(raw string) string { return strings.Repeat(" ", 3<<19) + raw }
	for _, row := range []struct {
		name   string
		img    interface{ RawManifest() ([]byte, error) }
		change func(string) string
		want   int
	}{
		{"ours, with a field that nobody knows", sample.Image, unknown, http.StatusForbidden},
		{"ours, over 1 MiB long", sample.Image, padded, http.StatusForbidden},
		{"somebody's, with a field that nobody knows", foreign, unknown, http.StatusCreated},
		{"somebody's, over 1 MiB long", foreign, padded, http.StatusCreated},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			raw, err := row.img.RawManifest()
			if err != nil {
				t.Fatal(err)
			}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPut,
				"http://"+host+"/v2/prebake/driver/manifests/changed",
				strings.NewReader(row.change(string(raw))))
			if err != nil {
				t.Fatal(err)
			}
			req.SetBasicAuth("any", token)
			req.Header.Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			if err = errors.Join(err, resp.Body.Close()); err != nil || resp.StatusCode != row.want {
				t.Errorf("PUT = %d %.300s, %v; want %d", resp.StatusCode, body, err, row.want)
			}
		})
	}
}
