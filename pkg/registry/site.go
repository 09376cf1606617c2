package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/prebake/prebake/pkg/fault"
)

// site reads an OCI image layout from a web server or from a Google Cloud Storage bucket. It sends GET requests only.
type site struct {
	base     *url.URL
	keys     authn.Keychain
	client   *http.Client
	agent    string
	retryFor time.Duration

	mu    sync.Mutex
	index []byte
	at    time.Time // when index was read; zero means never
}

// maxSiteIndex is the maximum size in bytes of a site's index, enough for about 30,000 entries.
const maxSiteIndex = 16 << 20

// indexAge is how long a site's index is used after it was read.
const indexAge = 30 * time.Second

// storageHost is the host of Cloud Storage. An object's path is /BUCKET/OBJECT (Cloud Storage documentation, "XML API
// request endpoints").
const storageHost = "storage.googleapis.com"

// openSite opens a site by its URL: https://…, http://… or gs://BUCKET/PREFIX.
func openSite(ref string, o Options) (store, error) {
	u, err := url.Parse(ref)
	if err == nil && (u.Host == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil) {
		err = errors.New("want https://HOST/FOLDER or gs://BUCKET/FOLDER")
	}
	if err != nil {
		return nil, err
	}
	if u.Scheme == "gs" {
		endpoint := "https://" + storageHost
		if emulator := os.Getenv("STORAGE_EMULATOR_HOST"); emulator != "" { // Google's own clients read the same variable
			endpoint = emulator
			if !strings.Contains(endpoint, "://") {
				endpoint = "http://" + endpoint
			}
		}
		at, err := url.Parse(endpoint)
		if err != nil {
			return nil, fmt.Errorf("STORAGE_EMULATOR_HOST: %w", err)
		}
		u = at.JoinPath(u.Host, u.Path)
	}
	tr := o.Transport
	if tr == nil {
		tr = http.DefaultTransport
	}
	s := &site{base: u, keys: o.Keychain, agent: o.UserAgent, retryFor: max(o.RetryFor, minRetryFor)}
	s.client = &http.Client{
		Transport: retryAfterTransport{rangeTransport{webPageTransport{stallTransport{tr}}}},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if len(via) >= 10 {
				return errors.New("the server redirected the request more than 10 times")
			}
			if from := via[0].URL; req.URL.Scheme != from.Scheme || req.URL.Host != from.Host {
				// In some cases, net/http sends Authorization even to another server after a redirect.
				req.Header.Del("Authorization")
			}
			return nil
		},
	}
	if s.keys == nil {
		s.keys = authn.DefaultKeychain
	}
	return &layoutStore{files: s}, nil
}

func (*site) cheapReads() bool  { return false }
func (*site) allAttached() bool { return true }

// resource is the host name for which [authn.Keychain] finds credentials.
type resource string

func (r resource) String() string      { return string(r) }
func (r resource) RegistryStr() string { return string(r) }

// get requests a file. It sends credentials only after the server has refused a request without them.
func (s *site) get(ctx context.Context, name string) (*http.Response, error) {
	at := s.base.JoinPath(name)
	denied := 0 // the last status 401 or 403
	for _, known := range []bool{false, true} {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
		if err != nil {
			return nil, err
		}
		if s.agent != "" {
			req.Header.Set("User-Agent", s.agent)
		}
		if known {
			sent, err := s.login(ctx, req)
			if err != nil {
				return nil, err
			}
			if !sent {
				break
			}
		}
		resp, err := s.client.Do(req)
		if err != nil {
			return nil, err
		}
		switch status := resp.StatusCode; {
		case status == http.StatusOK:
			return resp, nil
		case status == http.StatusNotFound:
			return nil, errors.Join(&fs.PathError{Op: "get", Path: at.String(), Err: fs.ErrNotExist}, resp.Body.Close())
		case status == http.StatusUnauthorized || status == http.StatusForbidden:
			denied = status
			if err := resp.Body.Close(); err != nil {
				return nil, err
			}
		case status == http.StatusTooManyRequests || status == http.StatusRequestTimeout || status >= 500:
			return nil, errors.Join(
				fault.New(fault.Transient, "get "+at.String()+": HTTP "+resp.Status, "try again later"),
				resp.Body.Close(),
			)
		default:
			return nil, errors.Join(
				fault.New(fault.Usage, "get "+at.String()+": HTTP "+resp.Status, "check the address of the repository"),
				resp.Body.Close(),
			)
		}
	}
	return nil, s.deniedError(at, denied)
}

// deniedError returns the error for a file that the server denied with this status. Amazon S3 and Cloud Storage respond
// with 403 for a missing object, too, if the caller may read objects but not list them (Amazon S3 API, "GetObject").
func (s *site) deniedError(at *url.URL, status int) error {
	err := fmt.Errorf("get %s: %w: HTTP %d %s", at, errDenied, status, http.StatusText(status))
	hint := "in Cloud Storage, give this machine's service account, or everybody, the role roles/storage.objectViewer " +
		"on the bucket; on another server, log in: docker login " + at.Host
	if status == http.StatusForbidden {
		err = fmt.Errorf("%w; the file is missing, or may not be read", err)
		hint = "check that the address is right and the file exists: if it is missing, copy the image layout there again; " +
			"if it exists, permit this machine to read it: in Amazon S3, s3:GetObject, and s3:ListBucket so that S3 tells " +
			"which files are missing; " + hint
	}
	return fault.Wrap(fault.Usage, err, hint)
}

// login adds the credentials for the host to a request, and reports whether there are any.
func (s *site) login(ctx context.Context, req *http.Request) (bool, error) {
	if ip := net.ParseIP(req.URL.Hostname()); req.URL.Scheme != "https" && (ip == nil || !ip.IsLoopback()) {
		return false, nil // without TLS, others on the network could read the credentials
	}
	a, err := authn.Resolve(ctx, s.keys, resource(req.URL.Host))
	if err != nil {
		return false, err
	}
	c, err := authn.Authorization(ctx, a)
	if err != nil || c == nil {
		return false, err
	}
	switch {
	case c.Username == "oauth2accesstoken": // the value is an access token for Google Cloud
		req.Header.Set("Authorization", "Bearer "+c.Password)
	case c.RegistryToken != "":
		req.Header.Set("Authorization", "Bearer "+c.RegistryToken)
	case c.Username != "":
		req.SetBasicAuth(c.Username, c.Password)
	default:
		return false, nil
	}
	return true, nil
}

func (s *site) read(ctx context.Context, name string, limit int64) ([]byte, error) {
	if name == indexFile {
		s.mu.Lock()
		defer s.mu.Unlock()
		if time.Since(s.at) < indexAge {
			return s.index, nil
		}
	}
	if name == indexFile {
		limit = maxSiteIndex
	}
	raw, err := s.readOnce(ctx, name, limit)
	if name == indexFile && errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(
			fault.NoArtifact,
			"there is no OCI image layout at "+s.base.String(),
			"copy a folder that builder wrote as oci:FOLDER to this address, and index.json as the last file",
		)
	}
	if name == indexFile && err == nil {
		s.index, s.at = raw, time.Now()
	}
	return raw, err
}

func (s *site) readOnce(ctx context.Context, name string, limit int64) ([]byte, error) {
	resp, err := s.get(ctx, name)
	if err != nil {
		return nil, s.readError(ctx, err)
	}
	defer resp.Body.Close()
	raw, err := readAll(resp.Body, name, limit)
	return raw, s.readError(ctx, err)
}

func (s *site) open(ctx context.Context, name string, size int64) (io.ReadCloser, error) {
	b := &stream{ctx: ctx, size: size, readError: s.readError, retryFor: s.retryFor}
	b.fetch = func(ctx context.Context) (io.Reader, io.Closer, error) {
		resp, err := s.get(ctx, name)
		if err != nil {
			return nil, nil, err
		}
		return resp.Body, resp.Body, nil
	}
	if err := b.open(); err != nil {
		return nil, err
	}
	return b, nil
}

// readError adds the fault kind to an error of a read.
func (s *site) readError(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err, ok := transportError(err, s.base.Host); ok {
		return err
	}
	if onNetwork(err) {
		return fault.Wrap(fault.Transient, err, "check that "+s.base.Host+" can be reached from here")
	}
	return damaged(err)
}

// readOnly returns the error for a write to a site or a tar.
func readOnly() error {
	return fault.New(
		fault.Usage,
		"write to repository: a web server or a tar can only be read",
		"publish to oci:FOLDER; then copy that folder to the web server, or pack it into a tar: builder bundle create",
	)
}

func isSite(name string) bool {
	scheme, _, ok := strings.Cut(name, "://")
	return ok && (scheme == "https" || scheme == "http" || scheme == "gs")
}
