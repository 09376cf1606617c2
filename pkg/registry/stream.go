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
	// idleTimeout is how long nothing more may come of an answer that began before its
	// connection is given up, and beginning how long an answer may take to begin: a registry
	// that is a mirror fetches a manifest first.
	idleTimeout      = 45 * time.Second
	firstByteTimeout = 4 * time.Minute
	// minRetryFor is how long a blob that broke is tried again at least.
	minRetryFor = 2 * time.Minute
	// progress is how much a connection has to deliver to count as one that works.
	progress = 64 << 10
)

// stream is a blob on its way; it lives for one call. A connection that breaks, or goes
// silent, is made again, and the blob goes on where it was.
type stream struct {
	ctx  context.Context
	size int64
	// fetch makes a connection on which the blob goes on as the context's [offsetKey] says,
	// reading gives an error of one its kind, and patience is how long it is tried again.
	fetch    func(context.Context) (body io.Reader, rc io.Closer, err error)
	reading  func(context.Context, error) error
	retryFor time.Duration

	done   int64     // bytes that were delivered
	body   io.Reader // of the connection that there is
	rc     io.Closer
	since  int64         // bytes of this connection
	broken time.Time     // since when nothing came; zero is not
	pause  time.Duration // before the next try
}

// open asks for what is missing of the blob.
func (b *stream) open() error {
	body, rc, err := b.fetch(context.WithValue(b.ctx, offsetKey{}, b.done))
	if err != nil {
		return b.reading(b.ctx, err)
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
		case b.done == b.size: // however the connection ended
			return n, io.EOF
		case errors.Is(err, io.EOF):
			// A connection that breaks says so (io.ErrUnexpectedEOF): this is all there is.
			return n, damaged(fmt.Errorf("blob has %d bytes; its descriptor says %d", b.done, b.size))
		}
		if err = b.reading(b.ctx, err); !fault.Is(err, fault.Transient) || b.ctx.Err() != nil {
			return n, err
		}
		if n > 0 {
			return n, nil // the next call meets the error again, or what follows
		}
		if err := b.again(err); err != nil {
			return 0, err
		}
	}
}

// again makes a new connection, or returns why it is given up.
func (b *stream) again(cause error) error {
	if b.broken.IsZero() {
		b.broken = time.Now()
	}
	for {
		b.pause = min(max(2*b.pause, 500*time.Millisecond), 15*time.Second)
		if time.Since(b.broken)+b.pause > b.retryFor {
			return fmt.Errorf("after %d of %d bytes: %w", b.done, b.size, cause)
		}
		if err := sleep(b.ctx, b.pause); err != nil {
			return err
		}
		_ = b.rc.Close() // it broke
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

// offsetKey is under which a request's context may hold an int64: where a blob goes on.
type offsetKey struct{}

// ranged asks for the rest of a blob (RFC 9110, 14). A registry that sends the whole of
// it all the same has its beginning thrown away.
type ranged struct{ next http.RoundTripper }

func (r ranged) RoundTrip(req *http.Request) (*http.Response, error) {
	from, _ := req.Context().Value(offsetKey{}).(int64)
	// A token is asked for with the same context; what a blob's address leads to is not
	// below that address.
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
			return nil, errors.Join(fault.Errorf(fault.Transient, "asked for a blob from byte %d on, got %.80q", from,
				resp.Header.Get("Content-Range")), resp.Body.Close())
		}
		resp.StatusCode, resp.Status = http.StatusOK, "200 OK" // the library knows no other
	case http.StatusOK:
		resp.Body = &skipping{resp.Body, from}
		if resp.ContentLength >= 0 {
			resp.ContentLength -= from
		}
	}
	return resp, nil
}

var contentRange = regexp.MustCompile(`^bytes ([0-9]+)-[0-9]+/([0-9]+|\*)$`)

// skipping throws away what comes first. Each read of it reads once, and may return
// nothing.
type skipping struct {
	io.ReadCloser
	left int64
}

func (s *skipping) Read(p []byte) (int, error) {
	if s.left == 0 {
		return s.ReadCloser.Read(p)
	}
	n, err := s.ReadCloser.Read(p[:min(int64(len(p)), s.left)])
	s.left -= int64(n)
	return 0, err
}

// steady gives up on answers that do not come, or end in silence: nothing of a registry
// may hold a node for ever. What is sent may take its time.
type steady struct{ next http.RoundTripper }

func (s steady) RoundTrip(req *http.Request) (*http.Response, error) {
	// Tokens are asked for by POST, too.
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
			"try again; check the network path to it"), err)
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
