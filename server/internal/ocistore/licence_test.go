package ocistore_test

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/server/internal/auth"
	"github.com/prebake/prebake/server/internal/ocistore"
)

// A public registry says so, and takes of NVIDIA's what its operator lets go. A stock
// client pushes.
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
			s, err := ocistore.Open(t.TempDir(), ocistore.Options{Public: row.public, Redistribute: row.says})
			if err != nil {
				t.Fatal(err)
			}
			srv := httptest.NewServer(ocistore.Handler(s, auth.New(auth.Config{First: token}), slog.New(slog.DiscardHandler)))
			t.Cleanup(func() {
				srv.Close()
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			})
			host := strings.TrimPrefix(srv.URL, "http://")
			repo, err := registry.Open(host+"/prebake/driver", registry.Options{Username: "any", Password: token})
			if err != nil {
				t.Fatal(err)
			}
			if seen, err := repo.Outsider(t.Context(), ""); err != nil || seen.Says != row.audience || !seen.Reads || seen.Host != host {
				t.Errorf("Outsider() = %+v, %v; want host %s that says %s", seen, err, host, row.audience)
			}
			resp, err := http.Get(srv.URL + "/v2/")
			if err != nil {
				t.Fatal(err)
			}
			_, err = io.Copy(io.Discard, resp.Body)
			if err = errors.Join(err, resp.Body.Close()); err != nil || resp.Header.Get("Prebake-Audience") != row.audience {
				t.Errorf("GET /v2/ says %q, %v; want %s", resp.Header.Get("Prebake-Audience"), err, row.audience)
			}
			for f, want := range map[target.Flavour]bool{target.Open: row.open, target.Proprietary: row.proprietary} {
				sample := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), target.Driver{Version: "535.261.03", Flavour: f}, "")
				_, err := repo.Push(t.Context(), sample.Image)
				if (err == nil) != want || err != nil && !strings.Contains(err.Error(), "--redistribute") {
					t.Errorf("Push(%s) = %v; want taken %t, or a word about --redistribute", f, err, want)
				}
				if _, err := repo.Resolve(t.Context(), sample.Digest); (err == nil) != want {
					t.Errorf("Resolve(%s) after the push = %v; want there %t", f, err, want)
				}
			}
			// What is not ours is taken.
			if _, err := repo.Push(t.Context(), image(t)); err != nil {
				t.Errorf("Push(somebody's image) = %v; want none", err)
			}
		})
	}
}
