package ocistore

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"

	"cuelabs.dev/go/oci/ociregistry"
	"cuelabs.dev/go/oci/ociregistry/ociserver"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/server/internal/auth"
)

// TokenPath is the path where clients get a token, by the token protocol of registries.
const TokenPath = "/v2/token"

// anonymousToken is the bearer token of clients that only read.
const anonymousToken = "anonymous"

// pushPrefix begins a token that a client requested for a push. The secret follows.
const pushPrefix = "push~"

// access finds the caller that a secret belongs to.
type access interface {
	Authenticate(ctx context.Context, secret string) (auth.Principal, error)
}

// Handler returns the handler of the distribution API. Everybody may read. A write needs the scope push, and a deletion
// the scope operate. The token is a Bearer token, or the password of HTTP Basic authentication.
//
// Most clients send credentials only after a 401 to GET /v2/. With a Basic challenge, some clients would not read
// without credentials. The challenge is therefore Bearer, and the token path also gives out an anonymous token. With
// it, docker, containerd, crane and cosign can all read and push.
func Handler(s *Store, who access, log *slog.Logger) http.Handler {
	h := &handler{store: s, access: who, log: log}
	h.api = ociserver.New(s, &ociserver.Options{
		MaxListPageSize: 1000,
		DebugID:         "embedded", // the default is a counter in a package variable
		WriteError:      h.writeError,
	})
	return h
}

type handler struct {
	store *Store
	access
	log *slog.Logger
	api http.Handler
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set(registry.AudienceHeader, h.store.audience())
	secret, asked := auth.Secret(r)
	secret, pushes := strings.CutPrefix(secret, pushPrefix)
	var who auth.Principal
	known := false
	if asked && secret != anonymousToken {
		var err error
		who, err = h.Authenticate(r.Context(), secret)
		if err != nil && !fault.Is(err, fault.Unauthorized) {
			h.log.ErrorContext(r.Context(), "caller not identified", "err", err)
			writeStatus(w, http.StatusServiceUnavailable, "UNAVAILABLE", "ask again; the server's log has the cause")
			return
		}
		if known = err == nil; known {
			auth.Write(r.Context(), who)
			r = r.WithContext(withOwner(r.Context(), who.Name))
		}
	}
	switch {
	case r.URL.Path == TokenPath:
		h.serveToken(w, r, secret, asked && secret != anonymousToken, known)
		return
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		if !known {
			h.challenge(w, r)
			return
		}
		if err := auth.Need(who, scopeOf(r)); err != nil {
			writeStatus(w, http.StatusForbidden, "DENIED", err.Error())
			return
		}
	case r.URL.Path == "/v2/" || r.URL.Path == "/v2":
		if !known && secret != anonymousToken {
			h.challenge(w, r)
			return
		}
	}
	if r.Method == http.MethodHead && known && auth.Need(who, auth.Push) == nil && h.hides(r, pushes) {
		h.writeError(w, r, ociregistry.ErrManifestUnknown)
		return
	}
	if h.adapt(w, r) {
		return
	}
	h.api.ServeHTTP(w, r.WithContext(withFull(withRange(r))))
}

// hides reports whether the handler must respond to a HEAD request for a manifest as if the manifest were unknown,
// because the manifest needs a damaged or lost blob. Clients with go-containerregistry first ask for the manifest, and
// push nothing if the registry has it. If the manifest is unknown, they ask for each blob and push those that are
// missing. Nodes can still read the rest.
//
// A client that asks for a tag may want to know whether the tag is free. The manifest is not hidden from such a client,
// unless its token is for a push. If a push asks for a tag that refers to other content, the push of the tag is refused
// anyway.
func (h *handler) hides(r *http.Request, pushes bool) bool {
	repo, kind, ref := kindOf(r.URL.Path)
	return kind == "manifests" && (pushes || strings.Contains(ref, ":")) && h.store.lacks(repo, ref)
}

// wantsPush reports whether a request for a token is for a push, such as scope=repository:NAME:pull,push.
func wantsPush(r *http.Request) bool {
	for _, scope := range strings.Fields(strings.Join(r.URL.Query()["scope"], " ")) {
		actions := scope[strings.LastIndex(scope, ":")+1:]
		if slices.Contains(strings.Split(actions, ","), "push") {
			return true
		}
	}
	return false
}

// scopeOf returns the scope that a write needs. Deleting an upload is part of a push.
func scopeOf(r *http.Request) auth.Scope {
	if r.Method == http.MethodDelete && !strings.Contains(r.URL.Path, "/blobs/uploads/") {
		return auth.Operate
	}
	return auth.Push
}

func (h *handler) challenge(w http.ResponseWriter, r *http.Request) {
	scheme := "http"
	if r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https" {
		scheme = "https"
	}
	w.Header().Set("Www-Authenticate", fmt.Sprintf("Bearer realm=%q,service=\"prebake\"", scheme+"://"+r.Host+TokenPath))
	h.writeError(w, r, ociregistry.ErrUnauthorized)
}

// serveToken gives a known caller its own secret as the token, and a caller without credentials the anonymous token.
// For a push, it adds pushPrefix.
func (h *handler) serveToken(w http.ResponseWriter, r *http.Request, secret string, asked, known bool) {
	if r.Method != http.MethodGet {
		// The registry does not support the protocol's OAuth2 form. After a 404, clients use GET.
		w.WriteHeader(http.StatusNotFound)
		return
	}
	grant := anonymousToken
	switch {
	case known && wantsPush(r):
		grant = pushPrefix + secret
	case known:
		grant = secret
	case asked:
		w.Header().Set("Www-Authenticate", `Basic realm="prebake"`)
		h.writeError(w, r, ociregistry.ErrUnauthorized)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	err := json.NewEncoder(w).Encode(map[string]any{"token": grant, "access_token": grant, "expires_in": 3600})
	if err != nil {
		h.log.DebugContext(r.Context(), "response not sent", "err", err)
	}
}

// writeError responds with an error. It only logs the server's own errors, because their texts contain paths.
func (h *handler) writeError(w http.ResponseWriter, r *http.Request, err error) {
	for _, name := range []string{"Etag", "Cache-Control"} { // these headers are for a response without an error
		w.Header().Del(name)
	}
	_, status := ociregistry.MarshalError(err)
	switch {
	case r.Context().Err() != nil:
		h.log.DebugContext(r.Context(), "client gone", "method", r.Method, "path", r.URL.Path, "err", err)
	case isFull(err) || wasFull(r.Context()):
		h.log.ErrorContext(r.Context(), "registry's disk is full", "method", r.Method, "path", r.URL.Path, "err", err)
		writeStatus(w, http.StatusInsufficientStorage, "DENIED", "the registry's disk is full")
		return
	case status >= http.StatusInternalServerError:
		h.log.ErrorContext(r.Context(), "request to the registry failed", "method", r.Method, "path", r.URL.Path, "err", err)
		writeStatus(w, status, "UNKNOWN", "internal error; the server's log has the cause")
		return
	}
	if err := ociregistry.WriteError(w, err); err != nil {
		h.log.DebugContext(r.Context(), "response not sent", "err", err)
	}
}
