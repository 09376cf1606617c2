package cosbucket

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"

	"cloud.google.com/go/storage"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/iterator"
	"google.golang.org/api/option"

	"github.com/prebake/prebake/pkg/fault"
)

// gcs is a bucket in Google Cloud Storage. STORAGE_EMULATOR_HOST redirects it,
// as it does every client of the library.
type gcs struct {
	client *storage.Client
	bucket *storage.BucketHandle
	name   string
	prefix string // "" or ending in a slash
}

func openGCS(ctx context.Context, u *url.URL) (*gcs, error) {
	if u.Host == "" {
		return nil, fault.New(fault.Usage, "no bucket in the URL", "write gs://BUCKET")
	}
	var options []option.ClientOption
	if !credentialsConfigured(os.Getenv) {
		// COS's buckets are public, and a token of a machine without rights is
		// refused where no token is not.
		options = append(options, option.WithoutAuthentication())
	}
	client, err := storage.NewClient(ctx, options...)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err, "check the Google credentials of this account, or unset GOOGLE_APPLICATION_CREDENTIALS")
	}
	client.SetRetry(storage.WithMaxAttempts(retryMax + 1))
	g := &gcs{client: client, bucket: client.Bucket(u.Host), name: u.Host, prefix: strings.Trim(u.Path, "/")}
	if g.prefix != "" {
		g.prefix += "/"
	}
	return g, nil
}

// credentialsConfigured reports whether somebody set up application default
// credentials for this account. A metadata server does not count.
func credentialsConfigured(getenv func(string) string) bool {
	if getenv("GOOGLE_APPLICATION_CREDENTIALS") != "" {
		return true
	}
	config := getenv("CLOUDSDK_CONFIG")
	if config == "" {
		config = filepath.Join(getenv("HOME"), ".config", "gcloud")
	}
	_, err := os.Stat(filepath.Join(config, "application_default_credentials.json"))
	return err == nil
}

func (g *gcs) get(ctx context.Context, name string) (io.ReadCloser, Attrs, error) {
	object := g.bucket.Object(g.prefix + name)
	attrs, err := object.Attrs(ctx)
	if err != nil {
		return nil, Attrs{}, gcsError(err)
	}
	// The generation pins the content: a download that breaks goes on with the
	// same bytes or not at all.
	r, err := object.Generation(attrs.Generation).ReadCompressed(true).NewReader(ctx)
	if err != nil {
		return nil, Attrs{}, gcsError(err)
	}
	return r, Attrs{Size: attrs.Size, MD5: hex.EncodeToString(attrs.MD5)}, nil
}

func (g *gcs) list(ctx context.Context, prefix, glob string) ([]string, error) {
	query := &storage.Query{Prefix: g.prefix + prefix}
	if glob != "" {
		query = &storage.Query{MatchGlob: g.prefix + glob}
	}
	if err := query.SetAttrSelection([]string{"Name"}); err != nil {
		return nil, err
	}
	var names []string
	for it := g.bucket.Objects(ctx, query); ; {
		attrs, err := it.Next()
		if errors.Is(err, iterator.Done) {
			return names, nil
		}
		if err != nil {
			return nil, gcsError(err)
		}
		if name := strings.TrimPrefix(attrs.Name, g.prefix); matches(name, prefix, glob) {
			names = append(names, name)
		}
	}
}

func (g *gcs) url(name string) string { return "gs://" + path.Join(g.name, g.prefix, name) }

func (g *gcs) close() error { return g.client.Close() }

func gcsError(err error) error {
	var api *googleapi.Error
	switch {
	case errors.Is(err, storage.ErrObjectNotExist), errors.Is(err, storage.ErrBucketNotExist):
		return missing(err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.As(err, &api) && api.Code < 500 && api.Code != http.StatusTooManyRequests && api.Code != http.StatusRequestTimeout:
		return statusError(api.Code)
	}
	return fault.Wrap(fault.Transient, fmt.Errorf("ask Google Cloud Storage: %w", err), "check the network, then try again")
}
