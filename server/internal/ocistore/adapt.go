package ocistore

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"strconv"
	"strings"

	"cuelabs.dev/go/oci/ociregistry"
	"github.com/opencontainers/go-digest"

	"github.com/prebake/prebake/pkg/fault"
)

// This file corrects requests and responses where the library differs from the distribution specification (v1.1) or
// from what clients expect. Quoted titles are sections of the specification.

// kindOf splits a path of the API into repository, kind and name of the object. A repository's name may contain a kind,
// so kindOf splits at the last one.
func kindOf(p string) (repo, kind, ref string) {
	p = strings.TrimPrefix(p, "/v2/")
	last := -1
	for _, k := range []string{"/blobs/uploads/", "/blobs/", "/manifests/", "/referrers/", "/tags/"} {
		if i := strings.LastIndex(p, k); i > last {
			last, repo, kind, ref = i, p[:i], strings.Trim(k, "/"), p[i+len(k):]
		}
	}
	return repo, kind, ref
}

// adapt corrects a request. It returns true if it has sent the response. Otherwise the library must handle the request.
func (h *handler) adapt(w http.ResponseWriter, r *http.Request) (done bool) {
	repo, kind, ref := kindOf(r.URL.Path)
	refuse := func(err error) bool { h.writeError(w, r, err); return true }
	switch {
	case kind == "manifests" && strings.Contains(ref, ":"):
		// "Errors": the error for a malformed digest is not "manifest unknown".
		if err := digest.Digest(ref).Validate(); err != nil {
			return refuse(fmt.Errorf("%w: %w", ociregistry.ErrDigestInvalid, err))
		}
	case kind == "blobs" && r.Method == http.MethodDelete:
		// "Deleting Blobs": a registry without this function responds with status 405.
		w.Header().Set("Allow", "GET, HEAD")
		writeStatus(
			w,
			http.StatusMethodNotAllowed,
			"UNSUPPORTED",
			"repositories share blobs; the server deletes a blob by itself when no manifest needs it any more",
		)
		return true
	case kind == "blobs/uploads" && r.Method == http.MethodDelete:
		id, err := base64.RawURLEncoding.DecodeString(path.Base(ref)) // the encoding of the library
		if err == nil {
			err = h.store.CancelUpload(string(id))
		}
		if err != nil {
			return refuse(fmt.Errorf("%w: %w", ociregistry.ErrBlobUploadUnknown, err))
		}
		w.WriteHeader(http.StatusNoContent)
		return true
	case kind == "blobs/uploads" && r.Method == http.MethodPost && r.URL.Query().Has("mount"):
		// "Mounting a blob from another repository": if the blob is missing, the server starts an upload instead.
		if _, err := h.store.ResolveBlob(r.Context(), repo, ociregistry.Digest(r.URL.Query().Get("mount"))); err != nil {
			r.URL.RawQuery = ""
		} else if query := r.URL.Query(); !query.Has("from") {
			query.Set("from", repo) // "Mounting a blob": without "from", the registry chooses the source
			r.URL.RawQuery = query.Encode()
		}
	}
	switch {
	case kind == "manifests" && r.Method == http.MethodPut:
		return h.readManifest(w, r, repo, ref)
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		return false
	case kind == "blobs" || kind == "manifests":
		return h.setCaching(w, r, kind, ref)
	case kind == "referrers" || kind == "tags":
		h.serveWithoutNull(w, r)
		return true
	}
	return false
}

// readManifest reads a manifest before the library does, so that a mistake of the client gets a client error. It
// returns true if it has sent the response.
func (h *handler) readManifest(w http.ResponseWriter, r *http.Request, repo, ref string) (done bool) {
	content, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxManifest))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		writeStatus(
			w,
			http.StatusRequestEntityTooLarge,
			"MANIFEST_INVALID",
			fmt.Sprintf("the manifest has more than %d bytes", MaxManifest),
		)
		return true
	case err != nil: // the body ended too early
		err = fmt.Errorf("%w: %w", ociregistry.ErrManifestInvalid, err)
	case !json.Valid(content):
		err = fmt.Errorf("%w: the manifest is not JSON", ociregistry.ErrManifestInvalid)
	}
	if err != nil {
		h.writeError(w, r, err)
		return true
	}
	if why := h.store.whyRestricted(content); why != "" {
		writeStatus(w, http.StatusForbidden, "DENIED", why)
		return true
	}
	if digest.Digest(ref).Validate() == nil && digest.Digest(ref).Algorithm() == digest.SHA512 {
		h.putSHA512(w, r, repo, digest.Digest(ref), content)
		return true
	}
	r.Body = io.NopCloser(bytes.NewReader(content))
	return false
}

// putSHA512 stores a manifest by its SHA-512 digest, which the library does not support.
func (h *handler) putSHA512(w http.ResponseWriter, r *http.Request, repo string, d digest.Digest, content []byte) {
	if digest.SHA512.FromBytes(content) != d {
		h.writeError(w, r, ociregistry.ErrDigestInvalid)
		return
	}
	desc, err := h.store.pushManifest(r.Context(), repo, "", d, content, r.Header.Get("Content-Type"))
	if err != nil {
		h.writeError(w, r, err)
		return
	}
	var m manifest
	if json.Unmarshal(content, &m) == nil && m.Subject != nil { // pushManifest has parsed it, so this cannot fail
		w.Header().Set("OCI-Subject", string(m.Subject.Digest))
	}
	w.Header().Set("Location", "/v2/"+repo+"/manifests/"+string(d))
	w.Header().Set("Docker-Content-Digest", string(desc.Digest))
	w.WriteHeader(http.StatusCreated)
}

// writeStatus writes an error of the specification with a status other than its usual one.
func writeStatus(w http.ResponseWriter, status int, code, message string) {
	type one struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string][]one{"errors": {{code, message}}}) // an error means that the client is gone
}

// setCaching sets headers for caches: the response to a path with a digest never changes. If the client has the blob
// already, setCaching responds with status 304 and returns true. It also changes a range from the end, which the
// library does not support, to a range from the start.
func (h *handler) setCaching(w http.ResponseWriter, r *http.Request, kind, ref string) (done bool) {
	d := ociregistry.Digest(ref)
	if digest.Digest(ref).Validate() != nil {
		w.Header().Set("Cache-Control", "no-cache") // a tag may move
		return false
	}
	size, err := h.store.statBlob(d)
	if err != nil {
		return false // the library responds with the reason
	}
	tag := strconv.Quote(ref)
	w.Header().Set("Etag", tag)
	w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	if kind == "blobs" && r.Header.Get("If-None-Match") == tag {
		w.WriteHeader(http.StatusNotModified)
		return true
	}
	if last, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes=-"); ok && kind == "blobs" {
		if n, err := strconv.ParseInt(last, 10, 64); err == nil && n > 0 && size > 0 {
			r.Header.Set("Range", fmt.Sprintf("bytes=%d-", max(size-n, 0)))
		}
	}
	return false
}

// serveWithoutNull responds to a request for a list. It replaces the library's null by an empty list.
func (h *handler) serveWithoutNull(w http.ResponseWriter, r *http.Request) {
	held := &bufferedBody{ResponseWriter: w, status: http.StatusOK}
	h.api.ServeHTTP(held, r)
	body := held.body.Bytes()
	for _, member := range []string{"tags", "manifests"} {
		body = bytes.Replace(body, []byte(`"`+member+`":null`), []byte(`"`+member+`":[]`), 1)
	}
	w.Header().Del("Content-Length")
	w.WriteHeader(held.status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // an error means that the client is gone
	}
}

// bufferedBody collects a response until it is complete.
type bufferedBody struct {
	http.ResponseWriter
	status int
	body   bytes.Buffer
}

func (h *bufferedBody) WriteHeader(status int)      { h.status = status }
func (h *bufferedBody) Write(p []byte) (int, error) { return h.body.Write(p) }

type rangeKey struct{}

// withRange returns a context that says whether a chunk has a Content-Range header. Without the header, the library
// passes offset 0.
func withRange(r *http.Request) context.Context {
	return context.WithValue(r.Context(), rangeKey{}, r.Header.Get("Content-Range") != "")
}

// offsetKnown reports whether the client gave the offset of a chunk. Callers that do not use HTTP always give the
// offset.
func offsetKnown(ctx context.Context) bool {
	given, told := ctx.Value(rangeKey{}).(bool)
	return given || !told
}

type fullKey struct{}

// withFull returns a context in which an upload notes that the disk is full. This is necessary for a PUT with content:
// there, the library's error has only the text of the cause.
func withFull(ctx context.Context) context.Context {
	return context.WithValue(ctx, fullKey{}, new(bool))
}

// fullOf returns the variable in which an upload notes that the disk is full, or nil.
func fullOf(ctx context.Context) *bool {
	full, _ := ctx.Value(fullKey{}).(*bool)
	return full
}

// wasFull reports whether an upload noted that the disk is full.
func wasFull(ctx context.Context) bool {
	full := fullOf(ctx)
	return full != nil && *full
}

// isFull reports whether an error is that of a full disk, or of the reserve.
func isFull(err error) bool { return fault.NoSpace(err) || fault.Is(err, fault.DiskFull) }
