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

// compression is gzip's level: most of the gain for little time.
const compression = 4

// compressFrom is the size in bytes from which an answer is compressed. A smaller
// one fits into one packet of Ethernet's anyway, and setting up the compressor costs
// more than all else that a node's question does.
const compressFrom = 1400

// etags gives answers to reads an ETag, and answers 304 to who has them. The body
// is made either way: what is saved is the way to the client. Large answers are
// compressed for who takes that.
func etags(next http.Handler) http.Handler {
	compressor := middleware.NewCompressor(
		compression,
		"application/json",
		"application/problem+json",
		"text/html",
		"text/css",
	)
	// This one takes a third of the time of the standard library's for a list of artifacts.
	compressor.SetEncoder("gzip", func(w io.Writer, level int) io.Writer {
		out, err := gzip.NewWriterLevel(w, level)
		if err != nil {
			return nil // which is how chi is told of a level that is none
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
			tag := fmt.Sprintf(`W/"%x"`, sum[:]) // weak: it may be compressed or not
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

// bufferResponse sends an answer once it is whole.
func bufferResponse(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		held := newBufferedResponse(w)
		defer held.free()
		next.ServeHTTP(held, r)
		held.send()
	})
}

// bufferedResponse keeps an answer until it is whole.
type bufferedResponse struct {
	http.ResponseWriter
	status int
	body   *bytes.Buffer
}

// buffers are buffers to use again.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// maxPooledBuffer is the largest buffer in bytes that is kept for the next answer.
const maxPooledBuffer = 256 << 10

func newBufferedResponse(w http.ResponseWriter) *bufferedResponse {
	return &bufferedResponse{ResponseWriter: w, status: http.StatusOK, body: buffers.Get().(*bytes.Buffer)}
}

// free hands the buffer back; nobody may use the answer afterwards.
func (h *bufferedResponse) free() {
	if h.body.Cap() <= maxPooledBuffer {
		h.body.Reset()
		buffers.Put(h.body)
	}
	h.body = nil
}

func (h *bufferedResponse) send() {
	h.ResponseWriter.WriteHeader(h.status)
	_, _ = h.ResponseWriter.Write(h.body.Bytes()) // the client is gone; there is nobody to tell
}

func (h *bufferedResponse) WriteHeader(status int)      { h.status = status }
func (h *bufferedResponse) Write(p []byte) (int, error) { return h.body.Write(p) }
func (h *bufferedResponse) Unwrap() http.ResponseWriter { return h.ResponseWriter }
