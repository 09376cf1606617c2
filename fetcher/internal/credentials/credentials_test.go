package credentials_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"

	"github.com/prebake/prebake/fetcher/internal/credentials"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
)

// docker writes Docker's config.json with this text to a new folder, and sets DOCKER_CONFIG to that folder.
func docker(t *testing.T, text string) {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// metadata starts a metadata server, as on Google Compute Engine, that counts its requests.
func metadata(t *testing.T, status int, answer string) *int {
	t.Helper()
	asked := 0
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		if r.Header.Get("Metadata-Flavor") != "Google" ||
			r.URL.Path != "/computeMetadata/v1/instance/service-accounts/default/token" {
			t.Errorf("asked for %s with %v", r.URL, r.Header)
		}
		w.WriteHeader(status)
		fmt.Fprint(w, answer)
	}))
	t.Cleanup(s.Close)
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(s.URL, "http://"))
	return &asked
}

func resolve(t *testing.T, k authn.Keychain, repo string) (string, error) {
	t.Helper()
	r, err := name.NewRepository(repo)
	if err != nil {
		t.Fatal(err)
	}
	a, err := authn.Resolve(t.Context(), k, r)
	if err != nil {
		return "", err
	}
	c, err := authn.Authorization(t.Context(), a)
	if err != nil {
		return "", err
	}
	return c.Username + ":" + c.Password, nil
}

const token = `{"access_token":"ya29.token","expires_in":3599,"token_type":"Bearer"}`

func TestGoogle(t *testing.T) {
	docker(t, `{}`)
	asked := metadata(t, http.StatusOK, token)
	k := credentials.Keychain()
	for repo, want := range map[string]string{
		"europe-docker.pkg.dev/p/r/driver": "oauth2accesstoken:ya29.token", "gcr.io/p/driver": "oauth2accesstoken:ya29.token",
		"storage.googleapis.com/bucket": "oauth2accesstoken:ya29.token", "eu.gcr.io/p/driver": "oauth2accesstoken:ya29.token",
		"registry.example.com/driver": ":", "evil-pkg.dev/driver": ":", "pkg.dev.example.com/driver": ":",
		"notgcr.io/driver": ":",
	} {
		if got, err := resolve(t, k, repo); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", repo, got, err, want)
		}
	}
	if *asked != 1 {
		t.Errorf("the metadata server was asked %d times; want once for an hour", *asked)
	}
}

func TestWithoutServiceAccount(t *testing.T) {
	docker(t, `{}`)
	metadata(t, http.StatusNotFound, "not found")
	if got, err := resolve(t, credentials.Keychain(), "gcr.io/p/driver"); err != nil || got != ":" {
		t.Errorf("without a service account: %q, %v; want nothing sent", got, err)
	}
	t.Setenv("GCE_METADATA_HOST", "127.0.0.1:1")
	if got, err := resolve(t, credentials.Keychain(), "gcr.io/p/driver"); err != nil || got != ":" {
		t.Errorf("on no machine of Google's: %q, %v; want nothing sent", got, err)
	}
	metadata(t, http.StatusForbidden, "no")
	if _, err := resolve(t, credentials.Keychain(), "gcr.io/p/driver"); !fault.Is(err, fault.Transient) ||
		fault.Hint(err) == "" {
		t.Errorf("a metadata server that refuses: %v; want transient", err)
	}
}

// TestDocker checks that a pull secret takes precedence over the token of the node's service account.
func TestDocker(t *testing.T) {
	docker(t, `{"auths":{"gcr.io":{"username":"_json_key","password":"x"}}}`)
	if got, err := resolve(t, credentials.Keychain(), "gcr.io/p/driver"); err != nil || got != "_json_key:x" {
		t.Errorf("with a pull secret: %q, %v", got, err)
	}
}

// TestBroken checks the error if the node's own Docker configuration is broken. The error must be of kind Usage, and
// its hint must not blame the content of the registry.
func TestBroken(t *testing.T) {
	for text, want := range map[string]string{`{broken`: "config.json",
		`{"credHelpers":{"127.0.0.1:1":"nowhere"}}`: "docker-credential-nowhere"} {
		docker(t, text)
		r, err := registry.Open("127.0.0.1:1/driver", registry.Options{Plain: true, Keychain: credentials.Keychain()})
		if err == nil {
			_, err = r.Manifest(t.Context(), "sha256:"+strings.Repeat("a", 64))
		}
		if !fault.Is(err, fault.Usage) || !strings.Contains(err.Error(), want) ||
			strings.Contains(fault.Hint(err), "altered") || fault.Hint(err) == "" {
			t.Errorf("%s: %v (%s); want a usage error about it", text, err, fault.Hint(err))
		}
	}
}
