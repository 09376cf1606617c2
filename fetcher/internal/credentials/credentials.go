// Package credentials finds a node's credentials for a registry. It reads Docker's configuration, whose format
// Kubernetes pull secrets share. For Google's registries, it then uses the machine's service account. It never guesses
// credentials.
package credentials

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/prebake/prebake/pkg/fault"
)

// Keychain returns the sources of credentials, Docker's configuration first. Its own errors are of kind Usage, or
// Transient if the metadata server fails.
func Keychain() authn.Keychain {
	return authn.NewMultiKeychain(docker{authn.DefaultKeychain}, &Google{})
}

// docker is a keychain that adds the kind and a hint to errors of Docker's configuration.
type docker struct{ authn.Keychain }

func (d docker) Resolve(r authn.Resource) (authn.Authenticator, error) {
	return d.ResolveContext(context.Background(), r)
}

// ResolveContext implements [authn.ContextKeychain].
func (d docker) ResolveContext(ctx context.Context, r authn.Resource) (authn.Authenticator, error) {
	a, err := authn.Resolve(ctx, d.Keychain, r)
	if err == nil {
		return a, nil
	}
	hint := "correct Docker's configuration, or set DOCKER_CONFIG to a folder with another configuration"
	if text := err.Error(); strings.Contains(text, "docker-credential-") && strings.Contains(text, "not found") {
		hint = "install that docker-credential program in a folder of PATH, or remove it from Docker's configuration; " +
			"Google's registries do not need it, because fetcher logs in there with the machine's service account"
	}
	return nil, fault.Wrap(fault.Usage, fmt.Errorf("find credentials for %s: %w", r.RegistryStr(), err), hint)
}

// metadataHost is the address of Google's metadata server. It needs no DNS.
const metadataHost = "169.254.169.254"

// tokenPath is the metadata server's path for the token of the service account (Compute Engine documentation, "Access
// scopes and tokens"). GKE's metadata server has the same path.
const tokenPath = "/computeMetadata/v1/instance/service-accounts/default/token"

// Google is the keychain for Google's registries and Cloud Storage. It uses the token of the machine's service account.
// Without one, only public artifacts can be read.
type Google struct {
	mu    sync.Mutex
	token string
	until time.Time
}

// Resolve implements [authn.Keychain].
func (g *Google) Resolve(r authn.Resource) (authn.Authenticator, error) {
	return g.ResolveContext(context.Background(), r)
}

// ResolveContext implements [authn.ContextKeychain].
func (g *Google) ResolveContext(ctx context.Context, r authn.Resource) (authn.Authenticator, error) {
	host := r.RegistryStr()
	if host != "gcr.io" && host != "storage.googleapis.com" && !strings.HasSuffix(host, ".gcr.io") &&
		!strings.HasSuffix(host, ".pkg.dev") {
		return authn.Anonymous, nil
	}
	token, err := g.get(ctx)
	if err != nil || token == "" {
		return authn.Anonymous, err
	}
	return authn.FromConfig(authn.AuthConfig{Username: "oauth2accesstoken", Password: token}), nil
}

// minLifetime is the remaining lifetime below which a token is replaced.
const minLifetime = time.Minute

func (g *Google) get(ctx context.Context) (string, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if time.Until(g.until) > minLifetime {
		return g.token, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	host := metadataHost
	if other := os.Getenv("GCE_METADATA_HOST"); other != "" { // Google's client libraries read the same variable
		host = other
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+tokenPath, nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("Metadata-Flavor", "Google")
	resp, err := (&http.Client{Transport: &http.Transport{}}).Do(req) // no proxy: the server is local
	if err != nil {
		if errors.Is(ctx.Err(), context.Canceled) {
			return "", context.Cause(ctx)
		}
		return "", nil // no metadata server: this machine is not Google's
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotFound {
		return "", nil // a machine without a service account
	}
	var answer struct {
		Token   string `json:"access_token"`
		Seconds int    `json:"expires_in"`
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("the metadata server answered with HTTP status %d", resp.StatusCode)
	}
	if err == nil {
		err = json.Unmarshal(raw, &answer)
	}
	if err != nil {
		return "", fault.Wrap(fault.Transient, fmt.Errorf("ask the metadata server for a token: %w", err),
			"to read private artifacts, give the machine's service account the scope devstorage.read_only; to read only "+
				"public artifacts, run the machine without a service account")
	}
	g.token, g.until = answer.Token, time.Now().Add(time.Duration(answer.Seconds)*time.Second)
	return g.token, nil
}
