package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/stall"
)

// BuildLog opens the log of a build. For a running build, the result is the part of the log that exists now. The caller
// must close the log.
func (c *Client) BuildLog(ctx context.Context, id int64) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	//nolint:bodyclose // the caller closes the log
	resp, err := c.request(ctx, http.MethodGet, buildPath(id)+"/log", "", nil)
	if err != nil {
		cancel()
		return nil, err
	}
	return stall.WatchSparse(resp.Body, fmt.Sprintf("the log of build %d", id), idleTimeout, cancel), nil
}

// FollowLog copies a build's log to out while the log grows, until the build has ended. It pauses between two requests,
// and retries if the server does not answer. If the log has become shorter, a new attempt of the build has begun, and
// FollowLog writes the new log from its beginning. FollowLog does not notice a new attempt whose log becomes longer
// than the former log within one pause.
//
// FollowLog is a function and not a method, so that a program that does not call it does not link it.
func FollowLog(ctx context.Context, c *Client, id int64, pause time.Duration, out io.Writer) error {
	written := int64(0)
	for {
		over := false
		b, err := c.Build(ctx, id)
		if err == nil {
			// The state is read before the log, so that the log of an ended build is complete.
			over = b.State != Queued && b.State != Building
			written, err = copyLog(ctx, c, id, written, out)
		}
		switch {
		case err == nil && over:
			return nil
		case err != nil && !fault.Of(err).Retryable() && (over || !fault.Is(err, fault.NotFound) || b.ID == 0):
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// copyLog writes to out the part of a log after the first written bytes. It returns the number of bytes of the log that
// are written now.
func copyLog(ctx context.Context, c *Client, id, written int64, out io.Writer) (int64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	header := http.Header{}
	if written > 0 { // asks for the last byte again, because a range cannot be empty
		header.Set("Range", fmt.Sprintf("bytes=%d-", written-1))
	}
	resp, err := c.send(ctx, http.MethodGet, buildPath(id)+"/log", header, nil)
	if err != nil {
		return written, err
	}
	if resp.StatusCode == http.StatusRequestedRangeNotSatisfiable { // a new attempt has begun
		return 0, drain(resp)
	}
	body := stall.WatchSparse(resp.Body, fmt.Sprintf("the log of build %d", id), idleTimeout, cancel)
	if resp.StatusCode == http.StatusPartialContent && written > 0 {
		_, err = io.CopyN(io.Discard, body, 1)
	} else {
		written = 0
	}
	if err == nil {
		var n int64
		n, err = io.Copy(out, body)
		written += n
	}
	return written, errors.Join(err, body.Close())
}

// PutBuildLog replaces the stored log of a build.
func (c *Client) PutBuildLog(ctx context.Context, id int64, log io.Reader) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	sent := &idleTimer{r: log, timer: time.AfterFunc(idleTimeout, func() {
		cancel(fault.New(fault.Transient, "send build log: the server has stopped reading the log", ""))
	})}
	defer sent.timer.Stop()
	resp, err := c.request(ctx, http.MethodPut, buildPath(id)+"/log", "text/plain; charset=utf-8", sent)
	if err != nil {
		return err
	}
	return drain(resp)
}

// AppendBuildLog appends a part to the log of a running build. The offset is the length in bytes of the log before this
// part. If the log has another length, or the build has ended, the error is of kind Mismatch.
func (c *Client) AppendBuildLog(ctx context.Context, id, offset int64, part []byte) error {
	at := buildPath(id) + "/log?offset=" + strconv.FormatInt(offset, 10)
	resp, err := c.request(ctx, http.MethodPatch, at, "text/plain; charset=utf-8", bytes.NewReader(part))
	if err != nil {
		return err
	}
	return drain(resp)
}

// idleTimer is a reader that restarts a timer at each read. The HTTP client reads only after it has sent the previous
// bytes, so the timer runs out if the server stops reading.
type idleTimer struct {
	r     io.Reader
	timer *time.Timer
}

func (s *idleTimer) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err == nil {
		s.timer.Reset(idleTimeout)
	} else {
		s.timer.Stop() // the wait for the answer has its own limit
	}
	return n, err
}
