package login_test

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"

	"github.com/prebake/prebake/builder/internal/login"
	"github.com/prebake/prebake/pkg/testkit/program"
)

// gcloud is a script that prints a token in the format of Google's gcloud.
const gcloud = `#!/bin/sh
echo '{"credential":{"access_token":"token-of-gcloud","token_expiry":"2999-01-01T00:00:00Z"}}'
`

// TestKeychain checks the credentials for Google's and other registries. For some hosts the Docker configuration has
// credentials, and for others it has none.
func TestKeychain(t *testing.T) {
	home := t.TempDir()
	for name, value := range map[string]string{
		"HOME": home, "DOCKER_CONFIG": home, "CLOUDSDK_CONFIG": home, "GOOGLE_APPLICATION_CREDENTIALS": "",
		"REGISTRY_AUTH_FILE": "", "XDG_RUNTIME_DIR": home,
		// This metadata server has no service account, so the machine itself has no credentials.
		"GCE_METADATA_HOST": noMetadata(t), "PATH": home,
	} {
		t.Setenv(name, value)
	}
	program.Write(t, filepath.Join(home, "gcloud"), []byte(gcloud))
	config, err := json.Marshal(map[string]any{"auths": map[string]any{
		"europe-docker.pkg.dev": map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte("me:written-down"))},
		"registry.example":      map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte("me:example"))},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, "config.json"), config, 0o600); err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{
		"us-docker.pkg.dev": "token-of-gcloud", "gcr.io": "token-of-gcloud", "europe-docker.pkg.dev": "written-down",
		"registry.example": "example", "other.example": "",
	} {
		reg, err := name.NewRegistry(host)
		if err != nil {
			t.Fatal(err)
		}
		auth, err := login.Keychain().Resolve(reg)
		if err != nil {
			t.Errorf("%s: Resolve = %v", host, err)
			continue
		}
		got := &authn.AuthConfig{}
		if auth != authn.Anonymous {
			if got, err = auth.Authorization(); err != nil {
				t.Errorf("%s: Authorization = %v", host, err)
				continue
			}
		}
		if got.Password != want {
			t.Errorf("%s: password = %q; want %q", host, got.Password, want)
		}
	}
}

// noMetadata runs a metadata server that has no service account.
func noMetadata(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}
