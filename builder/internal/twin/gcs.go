package twin

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"

	"cloud.google.com/go/storage"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/option"

	"github.com/prebake/prebake/pkg/fault"
)

// gcs is a destination in Google Cloud Storage.
type gcs struct {
	client *storage.Client
	bucket *storage.BucketHandle
	name   string
	prefix string // "" or ending in a slash
}

// maxAttempts bounds how often the library tries one request; every write here
// has a precondition, and so can be repeated.
const maxAttempts = 6

func openGCS(ctx context.Context, u *url.URL) (*gcs, error) {
	if u.Host == "" {
		return nil, fault.New(fault.Usage, "no bucket in the URL", "write gs://BUCKET/PREFIX")
	}
	prefix := strings.Trim(u.Path, "/")
	if prefix != path.Clean(prefix) && prefix != "" || strings.HasPrefix(prefix, "..") {
		return nil, fault.Errorf(fault.Usage, "prefix %q is not a clean path", u.Path)
	}
	client, err := storage.NewClient(ctx)
	if err != nil {
		// Without credentials a bucket may still be written by whoever is near,
		// as an emulator is; Google refuses, and then says what is missing.
		client, err = storage.NewClient(ctx, option.WithoutAuthentication())
	}
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err, "check the Google credentials of this account")
	}
	client.SetRetry(storage.WithMaxAttempts(maxAttempts), storage.WithErrorFunc(func(err error) bool {
		// The library leaves out the connection that ends without an answer,
		// after which nobody knows whether a write took effect.
		return storage.ShouldRetry(err) || errors.Is(err, io.EOF)
	}))
	g := &gcs{client: client, bucket: client.Bucket(u.Host), name: u.Host, prefix: prefix}
	if prefix != "" {
		g.prefix += "/"
	}
	return g, nil
}

func (g *gcs) object(name string) *storage.ObjectHandle { return g.bucket.Object(g.prefix + name) }

func (g *gcs) stat(ctx context.Context, name string) (attrs, bool, error) {
	a, err := g.object(name).Attrs(ctx)
	if errors.Is(err, storage.ErrObjectNotExist) {
		return attrs{}, false, nil
	}
	if err != nil {
		return attrs{}, false, g.fault(ctx, err)
	}
	return attrs{size: a.Size, md5: hex.EncodeToString(a.MD5)}, true, nil
}

// open's token is the generation.
func (g *gcs) open(ctx context.Context, name string) (io.ReadCloser, string, error) {
	r, err := g.object(name).ReadCompressed(true).NewReader(ctx)
	if errors.Is(err, storage.ErrObjectNotExist) {
		return nil, "", errAbsent
	}
	if err != nil {
		return nil, "", g.fault(ctx, err)
	}
	return r, strconv.FormatInt(r.Attrs.Generation, 10), nil
}

func (g *gcs) create(ctx context.Context, u upload) error {
	err := g.write(ctx, u, storage.Conditions{DoesNotExist: true})
	if errors.Is(err, errChanged) {
		return errExists
	}
	return err
}

func (g *gcs) replace(ctx context.Context, u upload, token string) error {
	// A public object is cached for an hour otherwise, also in Google's network.
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

func (g *gcs) remove(ctx context.Context, name, token string) error {
	c, err := state(token)
	if err != nil {
		return err
	}
	err = g.object(name).If(c).Delete(ctx)
	if errors.Is(err, storage.ErrObjectNotExist) { // or the answer to a first try was lost
		return nil
	}
	return g.fault(ctx, err)
}

// state is the condition that an object is still in the state of a token.
func state(token string) (storage.Conditions, error) {
	generation, err := strconv.ParseInt(token, 10, 64)
	if err != nil || generation == 0 {
		return storage.Conditions{}, fault.Errorf(fault.Internal, "generation %q", token)
	}
	return storage.Conditions{GenerationMatch: generation}, nil
}

// chunk is how much is held in memory to be sent again when the network fails.
const chunk = 16 << 20

func (g *gcs) write(ctx context.Context, u upload, c storage.Conditions) error {
	in, err := u.open()
	if err != nil {
		return err
	}
	defer in.Close()
	// Nothing becomes an object before Close; to end the context is to give up.
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := g.object(u.name).If(c).NewWriter(wctx)
	w.ContentType, w.CacheControl = u.contentType, u.cacheControl
	w.ChunkSize = int(min(chunk, u.size+1))
	w.MD5, w.CRC32C, w.SendCRC32C = u.md5[:], u.crc32c, true
	n, err := io.Copy(w, in)
	if err == nil && n != u.size {
		err = fault.Errorf(fault.Internal, "%s changed while it was read: %d bytes, was %d", u.name, n, u.size)
	}
	if err != nil {
		cancel()
		_ = w.Close() // it can only say that it was cancelled
		return g.fault(ctx, err)
	}
	return g.fault(ctx, w.Close())
}

func (g *gcs) url(name string) string { return "gs://" + path.Join(g.name, g.prefix, name) }

func (g *gcs) close() error { return g.client.Close() }

func (g *gcs) fault(ctx context.Context, err error) error {
	var api *googleapi.Error
	var known *fault.Error
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.As(err, &known):
		return err
	case errors.Is(err, storage.ErrBucketNotExist):
		return fault.Wrap(fault.Usage, err, "make the bucket, or name another one")
	case !errors.As(err, &api):
	case api.Code == http.StatusPreconditionFailed:
		return errChanged
	case api.Code == http.StatusNotFound:
		return fault.Wrap(fault.Usage, err, "make the bucket "+g.name+", or name another one")
	case api.Code == http.StatusUnauthorized || api.Code == http.StatusForbidden:
		return fault.Wrap(fault.PublishRefused, err, "log in with gcloud auth application-default login as somebody who may create objects in "+g.name)
	case api.Code < 500 && api.Code != http.StatusTooManyRequests && api.Code != http.StatusRequestTimeout:
		return fault.Wrap(fault.PublishRefused, err, "")
	}
	return fault.Wrap(fault.Transient, fmt.Errorf("ask Google Cloud Storage: %w", err), "check the network, then try again")
}
