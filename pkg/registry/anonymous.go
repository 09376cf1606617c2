package registry

import (
	"context"
	"errors"
	"net/http"
	"sync/atomic"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// AudienceHeader is a header in every response of a Prebake server's registry.
const AudienceHeader = "Prebake-Audience"

// The values of [AudienceHeader].
const (
	AudiencePrivate = "private"
	AudiencePublic  = "public"
)

// AnonymousAccess is what a client without credentials learns about a repository.
type AnonymousAccess struct {
	// Host is the registry's host, with the port if the reference has one. It is "" if the repository is an image layout.
	Host string
	// Visibility is the value of [AudienceHeader] in the registry's responses: "private", "public", or "" without it.
	Visibility string
	// Reads is true if a client without credentials may read.
	Reads bool
}

// AnonymousAccess sends the registry a request without credentials. If digest is not "", Reads is true if the manifest
// with this digest can be read. If digest is "", Reads is true if the tags can be listed, or if the response has status
// 404: then everybody will be able to read what is pushed there.
func (r *Repository) AnonymousAccess(ctx context.Context, digest string) (AnonymousAccess, error) {
	s, ok := r.s.(*remoteStore)
	if !ok {
		return AnonymousAccess{}, nil
	}
	out := AnonymousAccess{Host: s.repo.RegistryStr()}
	said := &visibilityReader{next: stallTransport{s.transport}}
	options := []remote.Option{
		remote.WithTransport(retryAfterTransport{boundTransport{said}}),
		remote.WithAuth(authn.Anonymous), remote.WithPageSize(1),
		remote.WithRetryStatusCodes(
			http.StatusRequestTimeout,
			http.StatusInternalServerError,
			http.StatusBadGateway,
			http.StatusGatewayTimeout,
		),
	}
	puller, err := remote.NewPuller(options...)
	if err != nil {
		return out, err
	}
	if digest != "" {
		_, err = puller.Head(ctx, s.repo.Digest(digest))
	} else {
		_, err = puller.Lister(ctx, s.repo)
	}
	out.Visibility, _ = said.visibility.Load().(string)
	var api *transport.Error
	switch {
	case err == nil:
		out.Reads = true
	case ctx.Err() == nil && errors.As(err, &api):
		switch {
		case api.StatusCode == http.StatusNotFound:
			out.Reads = digest == ""
		case api.StatusCode == http.StatusTooManyRequests || api.StatusCode == http.StatusRequestTimeout ||
			api.StatusCode >= 500:
			return out, s.readError(ctx, err)
		}
	default:
		return out, s.readError(ctx, err)
	}
	return out, nil
}

// visibilityReader stores the value of [AudienceHeader] from the responses, and removes links to next pages.
type visibilityReader struct {
	next       http.RoundTripper
	visibility atomic.Value
}

func (h *visibilityReader) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := h.next.RoundTrip(req)
	if err == nil {
		if word := resp.Header.Get(AudienceHeader); word == AudiencePrivate || word == AudiencePublic {
			h.visibility.Store(word)
		}
		resp.Header.Del("Link") // nobody reads the next page, so a wrong link does not matter
	}
	return resp, err
}
