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
)

// What the library's protocol does not do as the distribution specification (v1.1)
// wants it, or as clients expect, is done here, before it sees the request.

// kindOf splits a path of the API: the repository, what of it is named, and which one.
// A repository may have any of these words in its own name, so the last one counts.
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

// adapt answers a request itself, and returns true, or makes it one that the library
// answers rightly.
func (h *handler) adapt(w http.ResponseWriter, r *http.Request) (done bool) {
	repo, kind, ref := kindOf(r.URL.Path)
	refuse := func(err error) bool { h.writeError(w, r, err); return true }
	switch {
	case kind == "manifests" && strings.Contains(ref, ":"):
		// "Errors": a digest that is none is not a manifest that is unknown.
		if err := digest.Digest(ref).Validate(); err != nil {
			return refuse(fmt.Errorf("%w: %w", ociregistry.ErrDigestInvalid, err))
		}
	case kind == "blobs" && r.Method == http.MethodDelete:
		// "Deleting Blobs": a registry that does not do it says 405.
		w.Header().Set("Allow", "GET, HEAD")
		writeStatus(
			w,
			http.StatusMethodNotAllowed,
			"UNSUPPORTED",
			"blobs are shared by repositories, and go by themselves once no manifest names them",
		)
		return true
	case kind == "blobs/uploads" && r.Method == http.MethodDelete:
		id, err := base64.RawURLEncoding.DecodeString(path.Base(ref)) // the library's form
		if err == nil {
			err = h.store.CancelUpload(string(id))
		}
		if err != nil {
			return refuse(fmt.Errorf("%w: %w", ociregistry.ErrBlobUploadUnknown, err))
		}
		w.WriteHeader(http.StatusNoContent)
		return true
	case kind == "blobs/uploads" && r.Method == http.MethodPost && r.URL.Query().Has("mount"):
		// "Mounting a blob from another repository": one that is not there begins an
		// upload, which clients then go on with.
		if _, err := h.store.ResolveBlob(r.Context(), repo, ociregistry.Digest(r.URL.Query().Get("mount"))); err != nil {
			r.URL.RawQuery = ""
		} else if query := r.URL.Query(); !query.Has("from") {
			query.Set("from", repo) // "Mounting a blob": a registry may find the source itself
			r.URL.RawQuery = query.Encode()
		}
	}
	switch {
	case kind == "manifests" && r.Method == http.MethodPut:
		return h.readManifest(w, r, repo, ref)
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		return false
	case kind == "blobs" || kind == "manifests":
		return h.cached(w, r, kind, ref)
	case kind == "referrers" || kind == "tags":
		h.withoutNull(w, r)
		return true
	}
	return false
}

// readManifest reads a manifest before the library does: what is wrong with it is
// the client's mistake.
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
	case err != nil: // it stopped in the middle
		err = fmt.Errorf("%w: %w", ociregistry.ErrManifestInvalid, err)
	case !json.Valid(content):
		err = fmt.Errorf("%w: it is no JSON", ociregistry.ErrManifestInvalid)
	}
	if err != nil {
		h.writeError(w, r, err)
		return true
	}
	if why := h.store.restricted(content); why != "" {
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

// putSHA512 stores a manifest by a digest of the algorithm that the library lacks.
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
	if json.Unmarshal(content, &m) == nil && m.Subject != nil { // it was read once already
		w.Header().Set("OCI-Subject", string(m.Subject.Digest))
	}
	w.Header().Set("Location", "/v2/"+repo+"/manifests/"+string(d))
	w.Header().Set("Docker-Content-Digest", string(desc.Digest))
	w.WriteHeader(http.StatusCreated)
}

// writeStatus writes an error in the specification's form with a status that its
// code alone would not have.
func writeStatus(w http.ResponseWriter, status int, code, message string) {
	type one struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string][]one{"errors": {{code, message}}}) // the client is gone
}

// cached lets clients and proxies keep what is named by its digest for ever, answers
// who has it already, and makes a range from the end one from the beginning.
func (h *handler) cached(w http.ResponseWriter, r *http.Request, kind, ref string) (done bool) {
	d := ociregistry.Digest(ref)
	if digest.Digest(ref).Validate() != nil {
		w.Header().Set("Cache-Control", "no-cache") // a tag
		return false
	}
	size, err := h.store.has(d)
	if err != nil {
		return false // the library says why
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

// withoutNull makes empty lists lists: the library writes null.
func (h *handler) withoutNull(w http.ResponseWriter, r *http.Request) {
	held := &bufferedBody{ResponseWriter: w, status: http.StatusOK}
	h.api.ServeHTTP(held, r)
	body := held.body.Bytes()
	for _, member := range []string{"tags", "manifests"} {
		body = bytes.Replace(body, []byte(`"`+member+`":null`), []byte(`"`+member+`":[]`), 1)
	}
	w.Header().Del("Content-Length")
	w.WriteHeader(held.status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // the client is gone; there is nobody to tell
	}
}

// bufferedBody keeps an answer until it is whole.
type bufferedBody struct {
	http.ResponseWriter
	status int
	body   bytes.Buffer
}

func (h *bufferedBody) WriteHeader(status int)      { h.status = status }
func (h *bufferedBody) Write(p []byte) (int, error) { return h.body.Write(p) }

type rangeKey struct{}

// withRange tells the store whether a chunk says where it begins: the library hands
// on 0 for one that does not.
func withRange(r *http.Request) context.Context {
	return context.WithValue(r.Context(), rangeKey{}, r.Header.Get("Content-Range") != "")
}

// saysWhere reports what withRange was told; who does not speak HTTP says where.
func saysWhere(ctx context.Context) bool {
	given, told := ctx.Value(rangeKey{}).(bool)
	return given || !told
}
