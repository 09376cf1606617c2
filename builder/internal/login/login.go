// Package login finds the credentials with which the builder pushes to a registry. The first source is the user's
// Docker configuration. For Google's registries there is a second source: the credentials that Google's own tools use.
//
// The package refuses to ask Google for credentials for other registries.
package login

import (
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/google"
)

// Keychain returns a keychain with two sources. An entry of the Docker configuration comes first, because somebody
// wrote it on purpose. For Google's hosts (gcr.io, *.gcr.io, *-docker.pkg.dev) the second source follows: the
// application default credentials, which include the machine's service account, and gcloud.
func Keychain() authn.Keychain {
	return authn.NewMultiKeychain(authn.DefaultKeychain, google.Keychain)
}
