package stall_test

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/stall"
)

// link is a connection. Each Read returns a number of bytes after a pause. The end of the context breaks the
// connection.
type link struct {
	ctx   context.Context
	pause time.Duration
	bytes int
	left  int
}

func (l *link) Read(p []byte) (int, error) {
	if l.left == 0 {
		return 0, io.EOF
	}
	select {
	case <-l.ctx.Done():
		return 0, l.ctx.Err()
	case <-time.After(l.pause):
	}
	n := min(l.bytes, l.left, len(p))
	l.left -= n
	return n, nil
}

func (*link) Close() error { return nil }

// TestWatch checks which streams count as stalled. It runs on the fake clock of package synctest.
func TestWatch(t *testing.T) {
	t.Parallel()
	const limit = 45 * time.Second
	for name, row := range map[string]struct {
		pause time.Duration
		bytes int // number of bytes that one Read returns
		size  int // number of bytes in the whole stream
		// reader is the time that the reader of the stream takes between two reads.
		reader  time.Duration
		watch   func(io.ReadCloser, string, time.Duration, context.CancelFunc) *stall.Reader
		stalled bool
	}{
		"a trickle":                        {40 * time.Second, 1, 1 << 20, 0, stall.Watch, true},
		"many small reads, slow together":  {time.Second, 1 << 10, 1 << 20, 0, stall.Watch, true},
		"silence":                          {time.Hour, 1 << 20, 1 << 20, 0, stall.Watch, true},
		"a slow but honest link":           {time.Second, 2 << 10, 4 << 20, 0, stall.Watch, false},
		"a small blob":                     {40 * time.Second, 300, 300, 0, stall.Watch, false},
		"the last bytes of a blob":         {40 * time.Second, 64 << 10, 64<<10 + 1, 0, stall.Watch, false},
		"a reader that takes its time":     {time.Second, 4 << 10, 1 << 20, time.Hour, stall.Watch, false},
		"an empty blob":                    {0, 1, 0, 0, stall.Watch, false},
		"a log that grows slowly":          {40 * time.Second, 1, 100, 0, stall.WatchSparse, false},
		"a log whose server says no more":  {time.Hour, 1, 100, 0, stall.WatchSparse, true},
		"a log that is read now and again": {40 * time.Second, 1, 100, time.Hour, stall.WatchSparse, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				l := &link{ctx: ctx, pause: row.pause, bytes: row.bytes, left: row.size}
				r := row.watch(l, "x", limit, cancel)
				var err error
				for n := 0; err == nil; {
					n, err = r.Read(make([]byte, 64<<10))
					if n > 0 {
						time.Sleep(row.reader) // on the fake clock
					}
				}
				if row.stalled != fault.Is(err, fault.Transient) || !row.stalled && !errors.Is(err, io.EOF) {
					t.Errorf("Read = %v; want stalled: %v", err, row.stalled)
				}
				if err := r.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}
