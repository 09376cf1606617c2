// Package login finds the credentials for pushing to a registry. It reads the user's Docker configuration. For Google's
// registries, it then tries the application default credentials and gcloud.
//
// The package never asks Google for credentials for other registries.
package login

import (
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/google"
)

// Keychain returns a keychain with two sources. The Docker configuration comes first, because somebody wrote it on
// purpose. For Google's hosts (gcr.io, *.gcr.io, *-docker.pkg.dev), the application default credentials and gcloud
// follow.
func Keychain() authn.Keychain {
	return authn.NewMultiKeychain(authn.DefaultKeychain, google.Keychain)
}
