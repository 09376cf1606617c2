// Package stall ends downloads that receive no data any more, or next to none. It works with any protocol, and does not
// retry.
package stall

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// least is the number of bytes that must arrive within the time limit, except at the end of a download. With a limit of
// 45 seconds that is 1.5 KB per second. Without this minimum, a server that sends a byte now and then could block its
// reader for ever.
const least = 64 << 10

// Reader is a stream that ends with an error when no data arrives, or too little.
type Reader struct {
	io.ReadCloser
	what   string
	limit  time.Duration
	least  int           // bytes that must arrive within limit
	got    int           // bytes that arrived since left was limit
	left   time.Duration // time that the next Reads may still take together
	timer  *time.Timer   // runs during a Read
	silent *atomic.Bool
	cancel context.CancelFunc
}

// Watch guards the stream of a download. If the stream brings less than 64 KiB while its reader waits for the time
// limit, Read fails with an error of kind Transient. The time between two Reads does not count. cancel must cancel the
// context of the download; Watch calls it to end the Read. The argument what is the name of the download in the error.
func Watch(r io.ReadCloser, what string, limit time.Duration, cancel context.CancelFunc) *Reader {
	return watch(r, what, limit, least, cancel)
}

// WatchSparse works as [Watch] does, for a stream that may bring little for a long time, such as a log that is being
// written. Only a single Read that takes longer than limit fails.
func WatchSparse(r io.ReadCloser, what string, limit time.Duration, cancel context.CancelFunc) *Reader {
	return watch(r, what, limit, 1, cancel)
}

func watch(r io.ReadCloser, what string, limit time.Duration, least int, cancel context.CancelFunc) *Reader {
	w := &Reader{
		ReadCloser: r, what: what, limit: limit, least: least, left: limit, silent: new(atomic.Bool), cancel: cancel,
	}
	w.timer = time.AfterFunc(limit, func() {
		w.silent.Store(true)
		cancel()
	})
	w.timer.Stop()
	return w
}

// Read implements [io.Reader].
func (w *Reader) Read(p []byte) (int, error) {
	began := time.Now()
	w.timer.Reset(w.left)
	n, err := w.ReadCloser.Read(p)
	w.timer.Stop()
	w.left -= time.Since(began)
	if w.got += n; w.got >= w.least {
		w.got, w.left = 0, w.limit
	}
	if err != nil {
		w.cancel() // no more data is expected, and not every caller closes the stream
	}
	if err != nil && w.silent.Load() {
		// The stream returned the error of a cancelled context. Its text reads as if a person had cancelled, so another error
		// replaces it.
		err = fault.New(fault.Transient, w.reason(),
			"try again; check the network path to the server")
	}
	return n, err
}

func (w *Reader) reason() string {
	if w.got == 0 {
		return fmt.Sprintf("fetch %s: no data arrived for %v", w.what, w.limit)
	}
	return fmt.Sprintf("fetch %s: only %d bytes arrived in %v; want %d or more", w.what, w.got, w.limit, w.least)
}

// Close implements [io.Closer].
func (w *Reader) Close() error {
	w.timer.Stop()
	err := w.ReadCloser.Close()
	w.cancel()
	return err
}
