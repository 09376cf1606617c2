package ocistore

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"strings"

	"cuelabs.dev/go/oci/ociregistry"
	"cuelabs.dev/go/oci/ociregistry/ociserver"

	"github.com/prebake/prebake/pkg/fault"
)

// TokenPath is where clients that speak the registry token protocol get one.
const TokenPath = "/v2/token"

// anonymous is the bearer token of clients that only read. It opens nothing
// that is not open without it.
const anonymous = "anonymous"

// Handler serves the distribution API. Everybody may read; a write needs the
// token, as a Basic password under any user name or as a Bearer token.
//
// Stock clients ask GET /v2/ first and send credentials later only if that
// answers 401, and some refuse to read anonymously from a registry that says
// Basic. So the challenge is Bearer with a token endpoint that also hands out
// an anonymous token: then docker, containerd, crane and cosign all read
// without credentials and push with them.
func Handler(s *Store, token string, log *slog.Logger) http.Handler {
	h := &handler{store: s, token: token, log: log}
	h.api = ociserver.New(s, &ociserver.Options{
		MaxListPageSize: 1000,
		DebugID:         "embedded", // the default is a counter in a package variable
		WriteError:      h.writeError,
	})
	return h
}

type handler struct {
	store *Store
	token string
	log   *slog.Logger
	api   http.Handler
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	given, asked := credential(r)
	may := asked && Same(given, h.token)
	switch {
	case r.URL.Path == TokenPath:
		h.serveToken(w, r, asked, may)
		return
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		if !may {
			h.challenge(w, r)
			return
		}
	case r.URL.Path == "/v2/" || r.URL.Path == "/v2":
		if !may && given != anonymous {
			h.challenge(w, r)
			return
		}
	}
	if h.adapt(w, r) {
		return
	}
	h.api.ServeHTTP(w, r.WithContext(withRange(r)))
}

// credential returns what the request says to be allowed by.
func credential(r *http.Request) (secret string, given bool) {
	if _, password, ok := r.BasicAuth(); ok {
		return password, true
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return token, strings.EqualFold(scheme, "Bearer")
}

// Same compares secrets in constant time. An empty token lets nobody in.
func Same(given, token string) bool {
	a, b := sha256.Sum256([]byte(given)), sha256.Sum256([]byte(token))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1 && token != ""
}

func (h *handler) challenge(w http.ResponseWriter, r *http.Request) {
	scheme := "http"
	if r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https" {
		scheme = "https"
	}
	w.Header().Set("Www-Authenticate", fmt.Sprintf("Bearer realm=%q,service=\"prebake\"", scheme+"://"+r.Host+TokenPath))
	h.writeError(w, r, ociregistry.ErrUnauthorized)
}

// serveToken answers with the token to those who know it, and with the
// anonymous one to those who claim nothing.
func (h *handler) serveToken(w http.ResponseWriter, r *http.Request, asked, may bool) {
	if r.Method != http.MethodGet {
		// Clients fall back to GET when the OAuth2 form of the protocol is absent.
		w.WriteHeader(http.StatusNotFound)
		return
	}
	grant := anonymous
	switch {
	case may:
		grant = h.token
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
