package cli

import (
	"net/url"
	"slices"
	"strings"
)

// secretURL reports whether a text is a URL that contains a secret: a password before the host, or a secret query
// parameter. Such parameters are sslpassword in PostgreSQL's connection URIs, sig in Azure's shared access signatures,
// and X-Goog-Signature in Google's signed URLs. A text that looks like a URL but cannot be parsed counts as secret if
// it may contain a password.
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
