// Package login finds the credentials with which the builder pushes: those of
// the user's Docker configuration, and, for Google's registries, those that
// Google's own tools would use. It refuses to ask Google for anybody else's
// registry.
package login

import (
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/google"
)

// Keychain returns where credentials come from. What the Docker configuration
// says about a registry goes first: somebody wrote it down. Hosts of Google's
// (gcr.io, *.gcr.io, *-docker.pkg.dev) are then looked up in the application
// default credentials, a machine's own account included, and in gcloud.
func Keychain() authn.Keychain {
	return authn.NewMultiKeychain(authn.DefaultKeychain, google.Keychain)
}
