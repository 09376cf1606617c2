// Package gcs is shared by readers and writers of Google Cloud Storage. It has a handle for a bucket or for a folder in
// a bucket, and classifies the errors of Google's client library. The caller opens the client, because only some
// clients need credentials.
package gcs

import (
	"errors"
	"fmt"
	"net/http"
	"path"
	"strings"

	"cloud.google.com/go/storage"
	"google.golang.org/api/googleapi"

	"github.com/prebake/prebake/pkg/fault"
)

// Bucket is a folder in a bucket, or a whole bucket.
type Bucket struct {
	*storage.BucketHandle
	client *storage.Client
	prefix string // "" or ending in a slash
}

// New returns a handle for a folder of a bucket. If folder is "", the handle is for the whole bucket. [Bucket.Close]
// closes the client.
func New(client *storage.Client, name, folder string) Bucket {
	b := Bucket{client.Bucket(name), client, strings.Trim(folder, "/")}
	if b.prefix != "" {
		b.prefix += "/"
	}
	return b
}

// Path returns an object's full name in the bucket, from the object's name in the folder. [Bucket.Trim] does the
// reverse.
func (b Bucket) Path(name string) string { return b.prefix + name }

// Trim returns an object's name in the folder, from the object's full name in the bucket.
func (b Bucket) Trim(path string) string { return strings.TrimPrefix(path, b.prefix) }

// Object returns a handle for an object in the folder.
func (b Bucket) Object(name string) *storage.ObjectHandle {
	return b.BucketHandle.Object(b.Path(name))
}

// URL returns an object's gs:// address.
func (b Bucket) URL(name string) string {
	return "gs://" + path.Join(b.BucketName(), b.prefix, name)
}

// Close closes the client.
func (b Bucket) Close() error { return b.client.Close() }

// Status returns the HTTP status in an error's chain; 0 means that there is none.
func Status(err error) int {
	var answer *googleapi.Error
	if errors.As(err, &answer) {
		return answer.Code
	}
	return 0
}

// Refused reports whether a status is final: a repeated request would get the same response.
func Refused(status int) bool {
	return status != 0 && status < 500 && status != http.StatusTooManyRequests && status != http.StatusRequestTimeout
}

// TransientError returns an error of kind Transient, for an error of the service that may pass.
func TransientError(err error) error {
	return fault.Wrap(fault.Transient, fmt.Errorf("ask Google Cloud Storage: %w", err),
		"check the network, then try again")
}
