// Package gcs is what readers and writers of Google Cloud Storage share: a
// bucket with the folder in it that is used, and what the library's errors mean.
// It opens no client: readers ask without credentials first, writers with them.
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

// Bucket is a folder of a bucket, or all of it.
type Bucket struct {
	*storage.BucketHandle
	client *storage.Client
	prefix string // "" or ending in a slash
}

// New names a folder of a bucket; "" means all of it. Close closes the client.
func New(client *storage.Client, name, folder string) Bucket {
	b := Bucket{client.Bucket(name), client, strings.Trim(folder, "/")}
	if b.prefix != "" {
		b.prefix += "/"
	}
	return b
}

// Path is an object's name in the bucket; Trim is the way back.
func (b Bucket) Path(name string) string { return b.prefix + name }

// Trim is an object's name in the folder.
func (b Bucket) Trim(path string) string { return strings.TrimPrefix(path, b.prefix) }

// Object is an object of the folder.
func (b Bucket) Object(name string) *storage.ObjectHandle {
	return b.BucketHandle.Object(b.Path(name))
}

// URL is an object's gs:// address.
func (b Bucket) URL(name string) string {
	return "gs://" + path.Join(b.BucketName(), b.prefix, name)
}

// Close closes the client.
func (b Bucket) Close() error { return b.client.Close() }

// Status is the HTTP status behind an error; 0 where there is none.
func Status(err error) int {
	var answer *googleapi.Error
	if errors.As(err, &answer) {
		return answer.Code
	}
	return 0
}

// Refused reports whether a status is an answer that asking again does not
// change.
func Refused(status int) bool {
	return status != 0 && status < 500 && status != http.StatusTooManyRequests && status != http.StatusRequestTimeout
}

// TransientError is the error of a service that may work later.
func TransientError(err error) error {
	return fault.Wrap(fault.Transient, fmt.Errorf("ask Google Cloud Storage: %w", err),
		"check the network, then try again")
}
