package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/stall"
)

const (
	// idleTimeout is how long a response may pause, and how long it may take for 64 KiB. If a response takes longer,
	// the client closes the connection. firstByteTimeout is how long a response may take to begin. firstByteTimeout is
	// longer than idleTimeout, because a registry that is a mirror first downloads the manifest itself.
	idleTimeout      = 45 * time.Second
	firstByteTimeout = 4 * time.Minute
	// minRetryFor is the minimum time for which a broken download is retried.
	minRetryFor = 2 * time.Minute
	// progress is how many bytes a connection has to deliver before the time for retries begins anew.
	progress = 64 << 10
)

// stream reads one blob. If a connection breaks or stalls, stream opens a new one and continues at the same offset.
type stream struct {
	ctx  context.Context
	size int64
	// fetch opens a connection that starts at the blob's offset in the context's value [offsetKey]. readError adds the
	// fault kind to an error of a connection. retryFor is how long a broken download is retried.
	fetch     func(context.Context) (body io.Reader, rc io.Closer, err error)
	readError func(context.Context, error) error
	retryFor  time.Duration

	done   int64     // bytes that were delivered to the caller
	body   io.Reader // body of the open connection
	rc     io.Closer
	since  int64         // bytes that the open connection delivered
	broken time.Time     // time of the first error since the last progress; zero if the connection works
	pause  time.Duration // before the next retry
}

// open opens a connection for the rest of the blob.
func (b *stream) open() error {
	body, rc, err := b.fetch(context.WithValue(b.ctx, offsetKey{}, b.done))
	if err != nil {
		return b.readError(b.ctx, err)
	}
	b.body, b.rc, b.since = body, rc, 0
	return nil
}

func (b *stream) Read(p []byte) (int, error) {
	for {
		n, err := b.body.Read(p)
		if b.done += int64(n); b.done > b.size {
			return 0, damaged(errTooLong)
		}
		if b.since += int64(n); b.since >= progress {
			b.broken, b.pause = time.Time{}, 0
		}
		switch {
		case err == nil && n == 0:
			continue
		case err == nil:
			return n, nil
		case b.done == b.size: // complete, whatever error the connection ended with
			return n, io.EOF
		case errors.Is(err, io.EOF):
			// A broken connection gives io.ErrUnexpectedEOF. So after io.EOF, the blob itself is too short.
			return n, damaged(fmt.Errorf("the blob has %d bytes; the manifest says %d bytes", b.done, b.size))
		}
		if err = b.readError(b.ctx, err); !fault.Is(err, fault.Transient) || b.ctx.Err() != nil {
			return n, err
		}
		if n > 0 {
			return n, nil // the next call gets the error again, or more bytes
		}
		if err := b.reconnect(err); err != nil {
			return 0, err
		}
	}
}

// reconnect opens a new connection, or returns the error that ends the retries.
func (b *stream) reconnect(cause error) error {
	if b.broken.IsZero() {
		b.broken = time.Now()
	}
	for {
		b.pause = min(max(2*b.pause, 500*time.Millisecond), 15*time.Second)
		if time.Since(b.broken)+b.pause > b.retryFor {
			return fmt.Errorf("the connection broke after %d of %d bytes: %w", b.done, b.size, cause)
		}
		if err := sleep(b.ctx, b.pause); err != nil {
			return err
		}
		_ = b.rc.Close() // broken, so its error does not matter
		err := b.open()
		if err == nil {
			return nil
		}
		if cause = err; !fault.Is(err, fault.Transient) || b.ctx.Err() != nil {
			return err
		}
	}
}

func (b *stream) Close() error { return b.rc.Close() }

// offsetKey is a context key. Its value is an int64: the offset at which a blob continues.
type offsetKey struct{}

// rangeTransport requests the rest of a blob by a Range header (RFC 9110, 14). If a registry sends the whole blob
// instead, rangeTransport discards the beginning.
type rangeTransport struct{ next http.RoundTripper }

func (r rangeTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	from, _ := req.Context().Value(offsetKey{}).(int64)
	// A request for a token has the same context, but must have no range. After a redirect, the path may lack /blobs/, but
	// the field Response is set.
	if from <= 0 || req.Method != http.MethodGet || !strings.Contains(req.URL.Path, "/blobs/") && req.Response == nil {
		return r.next.RoundTrip(req)
	}
	req = req.Clone(req.Context())
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-", from))
	resp, err := r.next.RoundTrip(req)
	if err != nil {
		return resp, err
	}
	switch resp.StatusCode {
	case http.StatusPartialContent:
		m := contentRange.FindStringSubmatch(resp.Header.Get("Content-Range"))
		if m == nil || m[1] != strconv.FormatInt(from, 10) {
			return nil, errors.Join(fault.Errorf(fault.Transient,
				"read blob from byte %d on: the response has Content-Range %.80q; want a range from that byte on", from,
				resp.Header.Get("Content-Range")),
				resp.Body.Close())
		}
		resp.StatusCode, resp.Status = http.StatusOK, "200 OK" // the library accepts only 200
	case http.StatusOK:
		resp.Body = &skipReader{resp.Body, from}
		if resp.ContentLength >= 0 {
			resp.ContentLength -= from
		}
	}
	return resp, nil
}

var contentRange = regexp.MustCompile(`^bytes ([0-9]+)-[0-9]+/([0-9]+|\*)$`)

// skipReader discards the first bytes of a response. A Read that discards bytes returns 0 bytes.
type skipReader struct {
	io.ReadCloser
	rest int64 // number of bytes still to discard
}

func (s *skipReader) Read(p []byte) (int, error) {
	if s.rest == 0 {
		return s.ReadCloser.Read(p)
	}
	n, err := s.ReadCloser.Read(p[:min(int64(len(p)), s.rest)])
	s.rest -= int64(n)
	return 0, err
}

// stallTransport gives up on a response that does not begin, that stops in the middle, or whose bytes arrive too
// slowly. So no registry can block a node for ever. An upload has no time limit.
type stallTransport struct{ next http.RoundTripper }

func (s stallTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	// Check the path and not the method POST: requests for tokens are POST requests, too.
	if strings.Contains(req.URL.Path, "/blobs/uploads/") || req.Method == http.MethodPut ||
		req.Method == http.MethodPatch {
		return s.next.RoundTrip(req)
	}
	ctx, cancel := context.WithCancel(req.Context())
	waiting := time.AfterFunc(firstByteTimeout, cancel)
	resp, err := s.next.RoundTrip(req.WithContext(ctx))
	if !waiting.Stop() && req.Context().Err() == nil {
		err = errors.Join(fault.New(fault.Transient,
			fmt.Sprintf("%s %s: no answer for %v", req.Method, req.URL.Redacted(), firstByteTimeout),
			"try again; check the network path to this host"), err)
	}
	if err != nil || resp.Body == nil {
		if resp != nil && resp.Body != nil {
			err = errors.Join(err, resp.Body.Close())
		}
		cancel()
		return nil, err
	}
	resp.Body = stall.Watch(resp.Body, req.URL.Redacted(), idleTimeout, cancel)
	return resp, nil
}
