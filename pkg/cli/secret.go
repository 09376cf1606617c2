package cli

import (
	"net/url"
	"slices"
	"strings"
)

// secretURL reports whether a text is a URL with a secret in it: a password before the host, or
// one of the query. Such are sslpassword of PostgreSQL's connection URIs, sig of Azure's shared
// access signatures, and X-Goog-Signature of Google's signed URLs. What looks like a URL and
// cannot be read as one counts, where it may have a password.
func secretURL(text string) bool {
	u, err := url.Parse(text)
	if err != nil {
		return strings.Contains(text, "://") && strings.Contains(text, "@")
	}
	if _, password := u.User.Password(); password {
		return true
	}
	for key := range u.Query() {
		secret := []string{"password", "sslpassword", "token", "sig", "x-goog-signature"}
		if slices.Contains(secret, strings.ToLower(key)) {
			return true
		}
	}
	return false
}
