package registry

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/prebake/prebake/pkg/fault"
)

// remoteStore is a repository on a registry with the distribution API.
type remoteStore struct {
	repo    name.Repository
	options []remote.Option
	puller  *remote.Puller

	keys      authn.Keychain
	transport http.RoundTripper // without the wrappers that are in options
	retryFor  time.Duration
}

func openRemote(ref string, o Options) (*remoteStore, error) {
	if strings.Contains(ref, "://") {
		return nil, errors.New("the reference is a URL, not a repository")
	}
	// Without strict validation, the library would treat a name without a host as a repository on Docker Hub.
	parse := []name.Option{name.StrictValidation}
	if o.Plain {
		parse = append(parse, name.Insecure)
	}
	repo, err := name.NewRepository(ref, parse...)
	if err != nil {
		return nil, err
	}
	tr := o.Transport
	if tr == nil {
		tr = remote.DefaultTransport
	}
	keys := o.Keychain
	switch {
	case o.Password != "":
		login := authn.AuthConfig{Username: cmp.Or(o.Username, "token"), Password: o.Password}
		keys = fixedKeychain{authn.FromConfig(login)}
	case keys == nil:
		keys = authn.DefaultKeychain
	}
	s := &remoteStore{repo: repo, keys: keys, transport: tr, retryFor: max(o.RetryFor, minRetryFor),
		options: []remote.Option{
			remote.WithTransport(retryAfterTransport{boundTransport{rangeTransport{pagesTransport{lenientTransport{
				webPageTransport{stallTransport{tr}}}}}}}),
			remote.WithAuthFromKeychain(keys),
			// [retryAfterTransport] handles 429 and 503.
			remote.WithRetryStatusCodes(http.StatusRequestTimeout, http.StatusInternalServerError, http.StatusBadGateway,
				http.StatusGatewayTimeout),
		}}
	if o.UserAgent != "" {
		s.options = append(s.options, remote.WithUserAgent(o.UserAgent))
	}
	s.puller, err = remote.NewPuller(s.options...)
	return s, err
}

// reference parses a valid tag or digest.
func (s *remoteStore) reference(ref string) name.Reference {
	if digestPattern.MatchString(ref) {
		return s.repo.Digest(ref)
	}
	return s.repo.Tag(ref)
}

func (s *remoteStore) resolve(ctx context.Context, ref string) (v1.Descriptor, error) {
	// HEAD comes first, because registries do not count it as a pull. If the result of HEAD is not clear, GET decides.
	head, err := s.puller.Head(ctx, s.reference(ref))
	if err == nil && head.Digest.Algorithm == "sha256" {
		return v1.Descriptor{MediaType: head.MediaType, Digest: head.Digest, Size: head.Size}, nil
	}
	err = s.readError(ctx, err)
	if ctx.Err() != nil || fault.Is(err, fault.NoArtifact) || fault.Is(err, fault.Transient) {
		return v1.Descriptor{}, err
	}
	d, err := s.puller.Get(ctx, s.reference(ref))
	if err != nil {
		return v1.Descriptor{}, s.readError(ctx, err)
	}
	return v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}, nil
}

func (s *remoteStore) manifest(ctx context.Context, digest string) ([]byte, error) {
	d, err := s.puller.Get(ctx, s.repo.Digest(digest))
	if err != nil {
		return nil, s.readError(ctx, err)
	}
	return d.Manifest, nil
}

func (s *remoteStore) blob(ctx context.Context, digest string, size int64) (io.ReadCloser, error) {
	b := &stream{ctx: ctx, size: size, readError: s.readError, retryFor: s.retryFor}
	b.fetch = func(ctx context.Context) (io.Reader, io.Closer, error) {
		var body io.ReadCloser
		layer, err := s.puller.Layer(context.WithValue(ctx, bodyKey{}, &body), s.repo.Digest(digest))
		if err != nil {
			return nil, nil, err
		}
		rc, err := layer.Compressed()
		// The library hashes what passes through rc. The callers of blob hash the bytes anyway, so read body and only close
		// rc.
		return body, rc, err
	}
	if err := b.open(); err != nil {
		return nil, err
	}
	return b, nil
}

// has implements [store]. GET decides if HEAD finds no blob or its result is not clear. Some registries respond to HEAD
// with 404 or 403 for a blob that GET returns: artifact-keeper/artifact-keeper#3605, SgtSilvio/gradle-oci#154 (ECR
// Public).
func (s *remoteStore) has(ctx context.Context, d v1.Descriptor) (bool, error) {
	layer, err := s.puller.Layer(ctx, s.repo.Digest(d.Digest.String()))
	if err == nil {
		var has bool
		if has, err = partial.Exists(layer); has {
			return true, nil
		}
	}
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	if err = s.readError(ctx, err); fault.Is(err, fault.Transient) {
		return false, err
	}
	blob, err := s.blob(ctx, d.Digest.String(), d.Size)
	if fault.Is(err, fault.NoArtifact) {
		return false, nil
	}
	if err == nil {
		err = blob.Close()
	}
	return err == nil, err
}

// bodyKey is a context key. Its value is an *io.ReadCloser, in which [boundTransport] stores the newest response's
// body.
type bodyKey struct{}

// referrers implements [store]. If the list ends in the middle, referrers returns the part that was read, with a
// cutError.
func (s *remoteStore) referrers(ctx context.Context, digest string, _ bool) ([]v1.Descriptor, error) {
	read := &pagesRead{}
	list, err := s.readReferrers(ctx, digest, read)
	if read.cut == nil || ctx.Err() != nil {
		return list, err
	}
	if err == nil { // after some responses for a page, the library treats the list as empty
		err = s.readError(ctx, read.cut)
	}
	if !fault.Is(err, fault.Unverified) {
		err = fault.Wrap(fault.Transient, err,
			"try again later; "+s.repo.RegistryStr()+" listed only a part of what is attached")
	}
	return read.list, cutError{err}
}

// cutError is the error of a list that ended in the middle.
type cutError struct{ error }

// Unwrap returns the cause.
func (c cutError) Unwrap() error { return c.error }

func (s *remoteStore) readReferrers(ctx context.Context, digest string, read *pagesRead) ([]v1.Descriptor, error) {
	ctx = context.WithValue(ctx, pagesKey{}, read)
	idx, err := remote.Referrers(s.repo.Digest(digest), remote.Reuse(s.puller), remote.WithContext(ctx))
	if err != nil {
		return nil, s.readError(ctx, err)
	}
	m, err := idx.IndexManifest()
	if err != nil {
		return nil, damaged(err)
	}
	return m.Manifests, nil
}

func (s *remoteStore) push(ctx context.Context, img v1.Image) error {
	d, err := describe(img)
	if err != nil {
		return err
	}
	// A pusher skips what it sent before, without asking whether the repository still has it. A new pusher asks.
	p, err := remote.NewPusher(s.options...)
	if err != nil {
		return err
	}
	return s.writeError(ctx, p.Push(ctx, s.repo.Digest(d.Digest.String()), img))
}

func (s *remoteStore) tag(ctx context.Context, d v1.Descriptor, tag string) error {
	switch have, err := s.resolve(ctx, tag); {
	case err == nil && have.Digest == d.Digest:
		return nil
	case err == nil:
		return errTagTaken(have.Digest, d.Digest)
	case !fault.Is(err, fault.NoArtifact):
		return err
	}
	raw, err := s.manifest(ctx, d.Digest.String())
	if err != nil {
		return err
	}
	p, err := remote.NewPusher(s.options...)
	if err != nil {
		return err
	}
	if err := p.Put(ctx, s.repo.Tag(tag), rawManifest{raw: raw, mediaType: d.MediaType}); err != nil {
		return s.writeError(ctx, err)
	}
	// The API has no call that creates a tag only if the tag is missing. So the last of two writers wins. Read the tag
	// again.
	have, err := s.resolve(ctx, tag)
	if err == nil && have.Digest != d.Digest {
		err = errTagTaken(have.Digest, d.Digest)
	}
	return err
}

func (s *remoteStore) attach(ctx context.Context, a *attachment) error {
	img, err := a.image()
	if err != nil {
		return err
	}
	// Without the referrers API, attaching rewrites a list under a shared tag. If two writers do so at once, one entry is
	// lost. So check the list, and try again.
	const tries = 3
	for range tries {
		p, err := remote.NewPusher(s.options...)
		if err != nil {
			return err
		}
		adding := context.WithValue(ctx, attachKey{}, true)
		if err := p.Push(adding, s.repo.Digest(a.desc.Digest.String()), img); err != nil {
			return s.writeError(ctx, err)
		}
		// If the manifest exists already, Push does nothing, even if the manifest is not listed. Put always updates the list.
		listed, err := s.isListed(ctx, a)
		if listed || err != nil {
			return err
		}
		if err := p.Put(adding, s.repo.Digest(a.desc.Digest.String()), img); err != nil {
			return s.writeError(ctx, err)
		}
		if listed, err := s.isListed(ctx, a); listed || err != nil {
			return err
		}
	}
	// Quay answers from a cache that is up to a minute old (quay/quay#6510).
	for wait, waited := time.Second, time.Duration(0); waited < maxStale; waited, wait = waited+wait, min(2*wait,
		15*time.Second) {
		if err := sleep(ctx, wait); err != nil {
			return err
		}
		if listed, err := s.isListed(ctx, a); listed || err != nil {
			return err
		}
	}
	return fault.New(fault.Transient, "the registry does not list the new attachment",
		"try again; if the registry does not list it then either, use a registry with the OCI referrers API")
}

// maxStale is how long a new entry may be missing from a list of referrers.
const maxStale = 75 * time.Second

func (s *remoteStore) isListed(ctx context.Context, a *attachment) (bool, error) {
	list, err := s.referrers(ctx, a.subject.String(), false)
	if err != nil {
		return false, err
	}
	for _, d := range list {
		if d.Digest == a.desc.Digest {
			return true, nil
		}
	}
	return false, nil
}

// rawManifest is a manifest that is sent again to set a tag.
type rawManifest struct {
	raw       []byte
	mediaType types.MediaType
}

func (m rawManifest) RawManifest() ([]byte, error)        { return m.raw, nil }
func (m rawManifest) MediaType() (types.MediaType, error) { return m.mediaType, nil }

// readError adds the fault kind to an error of a read.
func (s *remoteStore) readError(ctx context.Context, err error) error {
	return s.classify(ctx, err, false)
}

// writeError adds the fault kind to an error of a write.
func (s *remoteStore) writeError(ctx context.Context, err error) error {
	return s.classify(ctx, err, true)
}

func (s *remoteStore) classify(ctx context.Context, err error, write bool) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	host := s.repo.RegistryStr()
	var api *transport.Error
	if errors.As(err, &api) {
		return responseError(s.repo, api, err, write)
	}
	if err, ok := transportError(err, host); ok {
		return err
	}
	// net/http has no error type for a server that speaks plain HTTP. If the text has an http:// URL, the client has
	// already tried plain HTTP.
	if text := err.Error(); strings.Contains(text, "server gave HTTP response to HTTPS client") &&
		!strings.Contains(text, `Get "http://`) {
		return fault.Wrap(fault.Usage, err,
			"configure TLS on "+host+": this program speaks plain HTTP only to loopback and private addresses")
	}
	if onNetwork(err) {
		hint := "check that " + host + " can be reached from here"
		if write && strings.Contains(host, ".dkr.ecr.") {
			// Amazon ECR closes the connection of a push to a repository that does not exist (aws/containers-roadmap#1970).
			hint += "; Amazon ECR closes the connection if the repository does not exist; to create it: " + createECR(s.repo)
		}
		return fault.Wrap(fault.Transient, err, hint)
	}
	if write {
		return err
	}
	// The remaining errors come from responses that the client library did not accept.
	return damaged(err)
}

// transportError adds the fault kind to an error from TLS or from a transport of this package. For any other error, the
// second result is false.
func transportError(err error, host string) (error, bool) {
	var known *fault.Error
	if errors.As(err, &known) { // from one of the transports between the library and the network
		return err, true
	}
	if errors.Is(err, errTooLong) {
		return fault.Wrap(fault.Unverified, err, ""), true
	}
	var authority x509.UnknownAuthorityError
	var hostname x509.HostnameError
	var verification *tls.CertificateVerificationError
	if errors.As(err, &authority) || errors.As(err, &hostname) || errors.As(err, &verification) {
		return fault.Wrap(fault.Usage, err, "install the certificate authority of "+host+" on this machine"), true
	}
	return err, false
}

func onNetwork(err error) bool {
	var network net.Error
	return errors.As(err, &network) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) ||
		errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EPIPE)
}

// errDenied is in the chain of the error of a web server that answered with 401 or 403.
var errDenied = errors.New("access denied")

// Denied reports whether err says that a registry or a web server answered with status 401 or 403. Some servers send
// these statuses for a missing artifact, too.
func Denied(err error) bool {
	var api *transport.Error
	return errors.Is(err, errDenied) ||
		errors.As(err, &api) && (api.StatusCode == http.StatusUnauthorized || api.StatusCode == http.StatusForbidden)
}

// unknownName reports whether the registry says that the repository does not exist.
func unknownName(api *transport.Error) bool {
	return slices.ContainsFunc(api.Errors,
		func(d transport.Diagnostic) bool { return d.Code == transport.NameUnknownErrorCode })
}

func createECR(repo name.Repository) string {
	return "aws ecr create-repository --repository-name " + repo.RepositoryStr()
}

// responseError maps an error response of a registry to an error with a fault kind and a hint.
func responseError(repo name.Repository, api *transport.Error, err error, write bool) error {
	host, status := repo.RegistryStr(), api.StatusCode
	login := "docker login " + host
	const flags = ", or give builder --username and --password"
	switch {
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		if write {
			return fault.Wrap(fault.PublishRefused, err,
				"log in as a user who may push"+flags+"; on Harbor, also check that the project exists; to log in: "+login)
		}
		return fault.Wrap(fault.Usage, err, "log in"+flags+"; to log in: "+login)
	case status == http.StatusTooManyRequests || status == http.StatusRequestTimeout || status >= 500:
		return fault.Wrap(fault.Transient, err, "try again later; "+host+" answered "+http.StatusText(status))
	case write && unknownName(api):
		return fault.Wrap(fault.PublishRefused, err,
			"create the repository "+repo.RepositoryStr()+" first, because "+host+" does not create it on push; "+
				"on Harbor, create the project; on Amazon ECR: "+createECR(repo))
	case write:
		return fault.Wrap(fault.PublishRefused, err,
			"read the registry's response; to test the registry without a build: builder doctor --to "+repo.Name())
	case status == http.StatusNotFound:
		return fault.Wrap(fault.NoArtifact, err, "")
	}
	return err
}

var errTooLong = errors.New("the response is too long")

// boundTransport stops reading a manifest or a list that is too long. The library's own bound of 100 MB is too high.
type boundTransport struct{ next http.RoundTripper }

func (b boundTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(req)
	if err != nil || resp.Body == nil {
		return resp, err
	}
	switch {
	case strings.Contains(req.URL.Path, "/referrers/"):
		resp.Body = &boundedBody{resp.Body, maxList}
	case strings.Contains(req.URL.Path, "/manifests/"), strings.HasSuffix(req.URL.Path, "/tags/list"):
		resp.Body = &boundedBody{resp.Body, MaxManifest}
	}
	if body, ok := req.Context().Value(bodyKey{}).(*io.ReadCloser); ok {
		*body = resp.Body
	}
	return resp, nil
}

type boundedBody struct {
	io.ReadCloser
	left int64
}

func (b *boundedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, errTooLong
	}
	return n, err
}
