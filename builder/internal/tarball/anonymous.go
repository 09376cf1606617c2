package tarball

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"

	"cloud.google.com/go/storage"
	"google.golang.org/api/iterator"
	"google.golang.org/api/option"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gcs"
	"github.com/prebake/prebake/pkg/registry"
)

// absentObject is the name of an object that never exists. Cloud Storage responds with 404 only to callers that may
// list the bucket, and 403 to all others (Cloud Storage documentation, "HTTP status and error codes").
const absentObject = ".prebake-outsider"

// AnonymousAccess tests, without credentials, whether everybody can read the object. If object is "", it tests whether
// everybody can list the bucket. For a folder, it tests nothing and returns the zero value.
func (b *Bucket) AnonymousAccess(ctx context.Context, object string) (registry.AnonymousAccess, error) {
	g, ok := b.s.(*googleBucket)
	if !ok {
		return registry.AnonymousAccess{}, nil
	}
	out := registry.AnonymousAccess{Host: storageHost()}
	client, err := storage.NewClient(ctx, option.WithoutAuthentication())
	if err != nil {
		return out, fault.Wrap(fault.Usage, err, "check STORAGE_EMULATOR_HOST")
	}
	defer client.Close() // the client wrote nothing, so no error is lost
	client.SetRetry(storage.WithMaxAttempts(maxAttempts))
	bucket := client.Bucket(g.BucketName())
	name := object
	if name == "" {
		name = absentObject
	}
	_, err = bucket.Object(g.Path(name)).Attrs(ctx)
	switch {
	case err == nil:
		out.Reads = true
	case errors.Is(err, storage.ErrObjectNotExist):
		if object == "" { // the bucket itself may not exist
			_, err := bucket.Objects(ctx, nil).Next()
			out.Reads = err == nil || errors.Is(err, iterator.Done)
		}
	case errors.Is(err, storage.ErrBucketNotExist),
		gcs.Status(err) == http.StatusUnauthorized,
		gcs.Status(err) == http.StatusForbidden:
	case ctx.Err() != nil:
		return out, context.Cause(ctx)
	default:
		return out, fmt.Errorf("read %s without credentials: %w", g.URL(name), gcs.TransientError(err))
	}
	return out, nil
}

// storageHost returns the host that the storage library sends its requests to.
func storageHost() string {
	at := os.Getenv("STORAGE_EMULATOR_HOST")
	if at == "" {
		return "storage.googleapis.com"
	}
	if u, err := url.Parse(at); err == nil && strings.Contains(at, "://") {
		return u.Host
	}
	return at
}
