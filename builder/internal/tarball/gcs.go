package tarball

import (
	"context"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"

	"cloud.google.com/go/storage"
	"google.golang.org/api/option"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gcs"
)

// googleBucket is a destination in Google Cloud Storage.
type googleBucket struct{ gcs.Bucket }

// maxAttempts is how often the library may send one request. Writes may be repeated too, because each has a
// precondition.
const maxAttempts = 6

func openGCS(ctx context.Context, u *url.URL) (*googleBucket, error) {
	if u.Host == "" {
		return nil, fault.New(fault.Usage, "the URL names no bucket", "write gs://BUCKET/PREFIX")
	}
	prefix := strings.Trim(u.Path, "/")
	if prefix != path.Clean(prefix) && prefix != "" || strings.HasPrefix(prefix, "..") {
		return nil, fault.Errorf(fault.Usage, "prefix %q: want a path without //, . and ..", u.Path)
	}
	client, err := storage.NewClient(ctx)
	if err != nil {
		// A bucket may be writable without credentials, as in an emulator. Google itself refuses the write.
		client, err = storage.NewClient(ctx, option.WithoutAuthentication())
	}
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err, "check the Google credentials of this account")
	}
	client.SetRetry(storage.WithMaxAttempts(maxAttempts), storage.WithErrorFunc(func(err error) bool {
		// The library does not retry if a connection ends without a response. The precondition makes a retry safe.
		return storage.ShouldRetry(err) || errors.Is(err, io.EOF)
	}))
	return &googleBucket{gcs.New(client, u.Host, prefix)}, nil
}

func (g *googleBucket) stat(ctx context.Context, name string) (attrs, bool, error) {
	a, err := g.Object(name).Attrs(ctx)
	if errors.Is(err, storage.ErrObjectNotExist) {
		return attrs{}, false, nil
	}
	if err != nil {
		return attrs{}, false, g.fault(ctx, err)
	}
	return attrs{size: a.Size, md5: hex.EncodeToString(a.MD5)}, true, nil
}

// open returns the object's generation as the token.
func (g *googleBucket) open(ctx context.Context, name string) (io.ReadCloser, string, error) {
	r, err := g.Object(name).ReadCompressed(true).NewReader(ctx)
	if errors.Is(err, storage.ErrObjectNotExist) {
		return nil, "", errAbsent
	}
	if err != nil {
		return nil, "", g.fault(ctx, err)
	}
	return r, strconv.FormatInt(r.Attrs.Generation, 10), nil
}

func (g *googleBucket) create(ctx context.Context, u upload) error {
	err := g.write(ctx, u, storage.Conditions{DoesNotExist: true})
	if errors.Is(err, errChanged) {
		return errExists
	}
	return err
}

func (g *googleBucket) replace(ctx context.Context, u upload, token string) error {
	// By default a public object is cached for an hour, in Google's network too. Readers must see the present state.
	u.cacheControl = "no-cache"
	if token == "" {
		return g.write(ctx, u, storage.Conditions{DoesNotExist: true})
	}
	c, err := state(token)
	if err != nil {
		return err
	}
	return g.write(ctx, u, c)
}

func (g *googleBucket) remove(ctx context.Context, name, token string) error {
	c, err := state(token)
	if err != nil {
		return err
	}
	err = g.Object(name).If(c).Delete(ctx)
	if errors.Is(err, storage.ErrObjectNotExist) { // the library's first attempt may have removed the object
		return nil
	}
	return g.fault(ctx, err)
}

// state returns the precondition that an object is still in the state of the token.
func state(token string) (storage.Conditions, error) {
	generation, err := strconv.ParseInt(token, 10, 64)
	if err != nil || generation == 0 {
		return storage.Conditions{}, fault.Errorf(fault.Internal, "generation %q of the object: want a number other than 0",
			token)
	}
	return storage.Conditions{GenerationMatch: generation}, nil
}

// chunk is the number of bytes that the library keeps, to send them again after a network error.
const chunk = 16 << 20

func (g *googleBucket) write(ctx context.Context, u upload, c storage.Conditions) error {
	in, err := u.open()
	if err != nil {
		return err
	}
	defer in.Close()
	// The object appears only when Close succeeds. Cancelling the context aborts the upload.
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := g.Object(u.name).If(c).NewWriter(wctx)
	w.ContentType, w.CacheControl = u.contentType, u.cacheControl
	w.ChunkSize = int(min(chunk, u.size+1))
	w.MD5, w.CRC32C, w.SendCRC32C = u.md5[:], u.crc32c, true
	n, err := io.Copy(w, in)
	if err == nil && n != u.size {
		err = fault.Errorf(fault.Internal, "%s changed while it was read: it had %d bytes before, and has %d bytes now",
			u.name, u.size, n)
	}
	if err != nil {
		cancel()
		_ = w.Close() // the only possible error is the cancellation
		return g.fault(ctx, err)
	}
	return g.fault(ctx, w.Close())
}

func (g *googleBucket) url(name string) string { return g.URL(name) }

func (g *googleBucket) close() error { return g.Close() }

func (g *googleBucket) fault(ctx context.Context, err error) error {
	var known *fault.Error
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.As(err, &known):
		return err
	case errors.Is(err, storage.ErrBucketNotExist):
		return fault.Wrap(fault.Usage, err, "make the bucket, or name another bucket")
	case gcs.Status(err) == http.StatusPreconditionFailed:
		return errChanged
	case gcs.Status(err) == http.StatusNotFound:
		return fault.Wrap(fault.Usage, err, "make the bucket "+g.BucketName()+", or name another bucket")
	case gcs.Status(err) == http.StatusUnauthorized, gcs.Status(err) == http.StatusForbidden:
		return fault.Wrap(fault.PublishRefused, err,
			"log in as somebody who may create objects in "+g.BucketName()+": gcloud auth application-default login")
	case gcs.Refused(gcs.Status(err)):
		return fault.Wrap(fault.PublishRefused, err, "")
	}
	return gcs.TransientError(err)
}
