package httpapi

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/go-chi/chi/v5/middleware"
	"github.com/klauspost/compress/gzip"
)

// compression is the level of gzip. It is fast, and compresses nearly as well as higher levels.
const compression = 4

// compressFrom is the minimum size of a response that is compressed, in bytes. Smaller responses fit one Ethernet
// packet, and starting the compressor would take longer than making the response for a node.
const compressFrom = 1400

// etags is a middleware that adds an ETag to the responses to GET and HEAD. If the client has the same response
// already, etags responds with status 304. It also compresses large responses for clients that accept gzip.
func etags(next http.Handler) http.Handler {
	compressor := middleware.NewCompressor(
		compression,
		"application/json",
		"application/problem+json",
		"text/html",
		"text/css",
	)
	// This gzip package compresses a list of artifacts in a third of the time that the standard library takes.
	compressor.SetEncoder("gzip", func(w io.Writer, level int) io.Writer {
		out, err := gzip.NewWriterLevel(w, level)
		if err != nil {
			return nil // tells chi that the level is invalid
		}
		return out
	})
	compressed := compressor.Handler(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			compressed.ServeHTTP(w, r)
			return
		}
		held := newBufferedResponse(w)
		defer held.free()
		next.ServeHTTP(held, r)
		if held.status == http.StatusOK {
			sum := sha256.Sum256(held.body.Bytes())
			tag := fmt.Sprintf(`W/"%x"`, sum[:]) // a weak tag, because the body may be compressed or not
			w.Header().Set("Etag", tag)
			if matches(r.Header.Get("If-None-Match"), tag) {
				w.Header().Del("Content-Type")
				w.WriteHeader(http.StatusNotModified)
				return
			}
		}
		if held.body.Len() < compressFrom {
			w.Header().Set("Content-Length", strconv.Itoa(held.body.Len()))
			held.send()
			return
		}
		compressor.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			held.ResponseWriter = w
			held.send()
		})).ServeHTTP(w, r)
	})
}

func matches(header, tag string) bool {
	for part := range strings.SplitSeq(header, ",") {
		if part = strings.TrimSpace(part); part == "*" || part == tag {
			return true
		}
	}
	return false
}

// bufferResponse is a middleware that sends a response only when the handler has written all of it.
func bufferResponse(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		held := newBufferedResponse(w)
		defer held.free()
		next.ServeHTTP(held, r)
		held.send()
	})
}

// bufferedResponse collects a response until it is complete.
type bufferedResponse struct {
	http.ResponseWriter
	status int
	body   *bytes.Buffer
}

// buffers has buffers for reuse.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// maxPooledBuffer is the maximum size of a reused buffer, in bytes.
const maxPooledBuffer = 256 << 10

func newBufferedResponse(w http.ResponseWriter) *bufferedResponse {
	return &bufferedResponse{ResponseWriter: w, status: http.StatusOK, body: buffers.Get().(*bytes.Buffer)}
}

// free returns the buffer to the pool. Do not use the response afterwards.
func (h *bufferedResponse) free() {
	if h.body.Cap() <= maxPooledBuffer {
		h.body.Reset()
		buffers.Put(h.body)
	}
	h.body = nil
}

func (h *bufferedResponse) send() {
	h.ResponseWriter.WriteHeader(h.status)
	_, _ = h.ResponseWriter.Write(h.body.Bytes()) // an error means that the client is gone
}

func (h *bufferedResponse) WriteHeader(status int)      { h.status = status }
func (h *bufferedResponse) Write(p []byte) (int, error) { return h.body.Write(p) }
func (h *bufferedResponse) Unwrap() http.ResponseWriter { return h.ResponseWriter }
