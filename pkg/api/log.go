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

// BuildLog opens a build's log, of a running build as far as it is there. The caller
// closes it.
func (c *Client) BuildLog(ctx context.Context, id int64) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	resp, err := c.do(ctx, http.MethodGet, buildPath(id)+"/log", "", nil) //nolint:bodyclose // by who reads the log
	if err != nil {
		cancel()
		return nil, err
	}
	return stall.Watch(resp.Body, fmt.Sprintf("the log of build %d", id), idleTimeout, cancel), nil
}

// FollowLog writes a build's log as it grows, until the build has ended. A log that has become
// shorter is that of a new try, and is written from its beginning; a new try that writes more
// than the last one within a pause goes on where that was. It looks once every pause, and
// waits for a server that is away. It is no method, so that programs which do not call it do not link it.
func FollowLog(ctx context.Context, c *Client, id int64, pause time.Duration, out io.Writer) error {
	written := int64(0)
	for {
		over := false
		b, err := c.Build(ctx, id)
		if err == nil {
			// The state is read first: what the log has then is all of it.
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

// copyLog writes what a log has beyond what was written already, and returns how much that
// is now.
func copyLog(ctx context.Context, c *Client, id, written int64, out io.Writer) (int64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	header := http.Header{}
	if written > 0 { // the last byte once more: there is no range without a byte
		header.Set("Range", fmt.Sprintf("bytes=%d-", written-1))
	}
	resp, err := c.send(ctx, http.MethodGet, buildPath(id)+"/log", header, nil)
	if err != nil {
		return written, err
	}
	if resp.StatusCode == http.StatusRequestedRangeNotSatisfiable { // another try began
		return 0, drain(resp)
	}
	body := stall.Watch(resp.Body, fmt.Sprintf("the log of build %d", id), idleTimeout, cancel)
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

// PutBuildLog stores a build's log in place of the one that is there.
func (c *Client) PutBuildLog(ctx context.Context, id int64, log io.Reader) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	sent := &idleTimer{r: log, timer: time.AfterFunc(idleTimeout, func() {
		cancel(fault.New(fault.Transient, "the server takes no more of the log", ""))
	})}
	defer sent.timer.Stop()
	resp, err := c.do(ctx, http.MethodPut, buildPath(id)+"/log", "text/plain; charset=utf-8", sent)
	if err != nil {
		return err
	}
	return drain(resp)
}

// AppendBuildLog adds to the log of a running build, at an offset in bytes: kind Mismatch
// when the log does not end there, or the build has ended.
func (c *Client) AppendBuildLog(ctx context.Context, id, offset int64, part []byte) error {
	at := buildPath(id) + "/log?offset=" + strconv.FormatInt(offset, 10)
	resp, err := c.do(ctx, http.MethodPatch, at, "text/plain; charset=utf-8", bytes.NewReader(part))
	if err != nil {
		return err
	}
	return drain(resp)
}

// idleTimer puts off a timer with each read: a transfer asks for more as long as it
// gets rid of what it has.
type idleTimer struct {
	r     io.Reader
	timer *time.Timer
}

func (s *idleTimer) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err == nil {
		s.timer.Reset(idleTimeout)
	} else {
		s.timer.Stop() // the answer has a bound of its own
	}
	return n, err
}
