package cli

import (
	"net/url"
	"slices"
	"strings"
)

// secretQueries are the secret parameters of a URL's query, in lower case. A signature is a secret too: everybody who
// has a signed URL has access.
var secretQueries = []string{
	"password", "token",
	"sslpassword",          // PostgreSQL's connection URIs
	"access_token",         // OAuth 2.0, RFC 6750, section 2.3
	"sig",                  // Azure's shared access signatures
	"signature",            // signed URLs of CloudFront, and older ones of S3 and Google
	"x-goog-signature",     // Google's signed URLs
	"x-amz-signature",      // AWS's presigned URLs, Signature Version 4
	"x-amz-security-token", // the session token in a presigned URL of AWS
}

// secretURL reports whether a text is a URL with a password before the host, or with a secret in its query. It also
// returns true for a URL that contains an @ and cannot be parsed.
func secretURL(text string) bool {
	u, err := url.Parse(text)
	if err != nil {
		return strings.Contains(text, "://") && strings.Contains(text, "@")
	}
	if _, password := u.User.Password(); password {
		return true
	}
	for key := range u.Query() {
		if slices.Contains(secretQueries, strings.ToLower(key)) {
			return true
		}
	}
	return false
}
