package ocistore

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"strings"

	"cuelabs.dev/go/oci/ociregistry"
	"cuelabs.dev/go/oci/ociregistry/ociserver"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/server/internal/auth"
)

// TokenPath is where clients that speak the registry token protocol get one.
const TokenPath = "/v2/token"

// anonymous is the bearer token of clients that only read. It opens nothing
// that is not open without it.
const anonymous = "anonymous"

// access finds out who calls.
type access interface {
	Authenticate(ctx context.Context, secret string) (auth.Principal, error)
}

// Handler serves the distribution API. Everybody may read; a write needs a token
// that may push, and a removal one that may operate, as a Basic password under any
// user name or as a Bearer token.
//
// Stock clients ask GET /v2/ first and send credentials later only if that
// answers 401, and some refuse to read anonymously from a registry that says
// Basic. So the challenge is Bearer with a token endpoint that also hands out
// an anonymous token: then docker, containerd, crane and cosign all read
// without credentials and push with them.
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
	var who auth.Principal
	known := false
	if asked && secret != anonymous {
		var err error
		who, err = h.Authenticate(r.Context(), secret)
		if err != nil && !fault.Is(err, fault.Unauthorized) {
			h.log.ErrorContext(r.Context(), "caller not identified", "err", err)
			writeStatus(w, http.StatusServiceUnavailable, "UNAVAILABLE", "ask again; the server's log has the cause")
			return
		}
		if known = err == nil; known {
			auth.Write(r.Context(), who)
		}
	}
	switch {
	case r.URL.Path == TokenPath:
		h.serveToken(w, r, secret, asked && secret != anonymous, known)
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
		if !known && secret != anonymous {
			h.challenge(w, r)
			return
		}
	}
	if h.adapt(w, r) {
		return
	}
	h.api.ServeHTTP(w, r.WithContext(withRange(r)))
}

// scopeOf returns what a write needs. An upload that is called off is part of a push.
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

// serveToken answers with the secret that a known caller showed, and with the
// anonymous one to those who claim nothing.
func (h *handler) serveToken(w http.ResponseWriter, r *http.Request, secret string, asked, known bool) {
	if r.Method != http.MethodGet {
		// Clients fall back to GET when the OAuth2 form of the protocol is absent.
		w.WriteHeader(http.StatusNotFound)
		return
	}
	grant := anonymous
	switch {
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
		h.log.DebugContext(r.Context(), "answer lost", "err", err)
	}
}

// writeError answers with an error. What is wrong inside the server, with its paths,
// is for the log.
func (h *handler) writeError(w http.ResponseWriter, r *http.Request, err error) {
	for _, name := range []string{"Etag", "Cache-Control"} { // of what was about to be sent
		w.Header().Del(name)
	}
	_, status := ociregistry.MarshalError(err)
	switch {
	case r.Context().Err() != nil:
		h.log.DebugContext(r.Context(), "client gone", "method", r.Method, "path", r.URL.Path, "err", err)
	case fault.NoSpace(err) || fault.Is(err, fault.DiskFull):
		h.log.ErrorContext(r.Context(), "registry's disk is full", "method", r.Method, "path", r.URL.Path, "err", err)
		writeStatus(w, http.StatusInsufficientStorage, "DENIED", "the registry's disk is full")
		return
	case status >= http.StatusInternalServerError:
		h.log.ErrorContext(r.Context(), "registry failed", "method", r.Method, "path", r.URL.Path, "err", err)
		writeStatus(w, status, "UNKNOWN", "internal error; the server's log has the cause")
		return
	}
	if err := ociregistry.WriteError(w, err); err != nil {
		h.log.DebugContext(r.Context(), "answer lost", "err", err)
	}
}
