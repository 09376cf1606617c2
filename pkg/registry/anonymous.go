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

// AudienceHeader is what a server of ours says in every answer of its registry: for whom
// it is, [AudiencePrivate] or [AudiencePublic], as its operator has it.
const AudienceHeader = "Prebake-Audience"

// The values of [AudienceHeader].
const (
	AudiencePrivate = "private"
	AudiencePublic  = "public"
)

// AnonymousAccess is what somebody without credentials learns of a repository.
type AnonymousAccess struct {
	// Host is who was asked, with a port where one is named; "" means a folder.
	Host string
	// Visibility is the registry's own answer, "private" or "public"; "" where it has none.
	Visibility string
	// Reads says that a client without credentials may read.
	Reads bool
}

// AnonymousAccess asks the registry without credentials. With a digest the answer is
// whether that very manifest can be read; without, whether the repository's tags can. A
// registry that knows no such repository, and says so to everybody, lets everybody read
// what will be there.
func (r *Repository) AnonymousAccess(ctx context.Context, digest string) (AnonymousAccess, error) {
	s, ok := r.s.(*remoteStore)
	if !ok {
		return AnonymousAccess{}, nil
	}
	out := AnonymousAccess{Host: s.repo.RegistryStr()}
	said := &visibilityReader{next: steady{s.transport}}
	options := []remote.Option{
		remote.WithTransport(retryAfterTransport{bounded{said}}), remote.WithAuth(authn.Anonymous), remote.WithPageSize(1),
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
			return out, s.reading(ctx, err)
		}
	default:
		return out, s.reading(ctx, err)
	}
	return out, nil
}

// visibilityReader notes what a registry says of itself.
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
	}
	return resp, err
}
