// Package login finds the credentials with which the builder pushes to a registry: in the user's Docker configuration,
// and for Google's registries also where Google's own tools find them.
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
