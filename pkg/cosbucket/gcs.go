package cosbucket

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"cloud.google.com/go/storage"
	"github.com/googleapis/gax-go/v2"
	"google.golang.org/api/iterator"
	"google.golang.org/api/option"
	htransport "google.golang.org/api/transport/http"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gcs"
)

// googleBucket is a bucket in Google Cloud Storage. The client library sends all requests to an emulator if
// STORAGE_EMULATOR_HOST is set.
type googleBucket struct {
	gcs.Bucket
	wait time.Duration
}

// gcsName is Google's rule for bucket names, including names that are domains.
var gcsName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]$`)

func openGCS(ctx context.Context, name, prefix string, wait time.Duration) (*googleBucket, error) {
	if !gcsName.MatchString(name) {
		return nil, fault.New(fault.Usage, fmt.Sprintf("%q is not the name of a bucket", name),
			"write gs://BUCKET, and separate several mirrors of one bucket with commas")
	}
	options := []option.ClientOption{option.WithScopes(storage.ScopeReadOnly)}
	if !credentialsConfigured(os.Getenv) {
		// COS's buckets are public. Google refuses a request with the token of a machine without access rights, but
		// serves a request without a token.
		options = []option.ClientOption{option.WithoutAuthentication()}
	}
	const hint = "check the Google credentials of this account; if the bucket is public, " +
		"unset GOOGLE_APPLICATION_CREDENTIALS"
	transport, _, err := htransport.NewClient(ctx, options...)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err, hint)
	}
	transport.Transport = bounded{transport.Transport}
	// Without the option WithoutAuthentication, the client would ask the metadata server for credentials, and wait for
	// it.
	client, err := storage.NewClient(ctx, option.WithHTTPClient(transport), option.WithoutAuthentication())
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err, hint)
	}
	client.SetRetry(storage.WithMaxAttempts(retryMax+1),
		storage.WithBackoff(gax.Backoff{Initial: wait, Max: 8 * wait, Multiplier: 2}))
	return &googleBucket{gcs.New(client, name, prefix), wait}, nil
}

// credentialsConfigured reports whether application default credentials are configured for this account, by a variable
// or by a file. It does not ask a metadata server.
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

// bounded is a transport that limits the number of requests for one download. Otherwise, the library would never give
// up on a server that breaks every response.
type bounded struct{ http.RoundTripper }

type budgetKey struct{}

var errBudget = fmt.Errorf("%d requests did not return the whole object", retryMax+1)

func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	if left, ok := req.Context().Value(budgetKey{}).(*atomic.Int32); ok && left.Add(-1) < 0 {
		return nil, errBudget
	}
	return b.RoundTripper.RoundTrip(req)
}

func (g *googleBucket) open(ctx context.Context, name string, offset int64, pin string) (io.ReadCloser, Attrs, error) {
	object := g.Object(name)
	var a Attrs
	if pin == "" {
		attrs, err := object.Attrs(ctx)
		if err != nil {
			return nil, Attrs{}, gcsError(err)
		}
		a = Attrs{Size: attrs.Size, MD5: hex.EncodeToString(attrs.MD5)}
		if attrs.CRC32C != 0 { // the library also returns 0 if there is no sum
			a.CRC32C = fmt.Sprintf("%08x", attrs.CRC32C)
		}
		pin = strconv.FormatInt(attrs.Generation, 10)
	}
	// The generation identifies the content, so a resumed download gets the same bytes or fails.
	generation, err := strconv.ParseInt(pin, 10, 64)
	if err != nil {
		return nil, Attrs{}, fault.Wrap(fault.Internal, err, "")
	}
	left := new(atomic.Int32)
	left.Store(retryMax + 1)
	ctx = context.WithValue(ctx, budgetKey{}, left)
	r, err := object.Generation(generation).ReadCompressed(true).NewRangeReader(ctx, offset, -1)
	if err != nil {
		err = gcsError(err)
		if fault.Is(err, fault.InputMissing) {
			err = fault.Wrap(fault.Transient, errors.New("the object was replaced while it was fetched"), "try again")
		}
		return nil, Attrs{}, err
	}
	a.pin = pin
	return r, a, nil
}

func (g *googleBucket) list(ctx context.Context, prefix string) ([]string, error) {
	return g.query(ctx, &storage.Query{Prefix: g.Path(prefix)})
}

func (g *googleBucket) folders(ctx context.Context) ([]string, error) {
	return g.query(ctx, &storage.Query{Prefix: g.Path(""), Delimiter: "/"})
}

// query returns the names of objects. If the query has a delimiter, it returns the prefixes before the delimiter.
func (g *googleBucket) query(ctx context.Context, query *storage.Query) ([]string, error) {
	query.Projection = storage.ProjectionNoACL
	if err := query.SetAttrSelection([]string{"Name"}); err != nil {
		return nil, err
	}
	var names []string
	for it := g.Objects(ctx, query); ; {
		attrs, err := it.Next()
		switch {
		case errors.Is(err, iterator.Done):
			return names, nil
		case err != nil:
			return nil, gcsError(err)
		case len(names) == maxListed:
			return nil, tooMany()
		case query.Delimiter == "":
			names = append(names, g.Trim(attrs.Name))
		case attrs.Prefix != "":
			names = append(names, strings.Trim(g.Trim(attrs.Prefix), "/"))
		}
	}
}

func (g *googleBucket) sibling(ctx context.Context, bucket string) (backend, error) {
	return openGCS(ctx, bucket, "", g.wait)
}

func (g *googleBucket) url(name string) string { return g.URL(name) }

func (g *googleBucket) close() error { return g.Close() }

func gcsError(err error) error {
	switch {
	case errors.Is(err, storage.ErrObjectNotExist), errors.Is(err, storage.ErrBucketNotExist):
		return missing(err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case gcs.Refused(gcs.Status(err)):
		return statusError(gcs.Status(err))
	}
	return gcs.TransientError(err)
}
