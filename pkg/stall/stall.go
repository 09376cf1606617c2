// Package stall ends downloads that go silent. It refuses to know what is downloaded,
// and to begin anything again.
package stall

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// Reader is a stream that ends when nothing comes.
type Reader struct {
	io.ReadCloser
	what   string
	limit  time.Duration
	timer  *time.Timer // running during a read
	silent *atomic.Bool
	cancel context.CancelFunc
}

// Watch guards a stream that ends with the context that cancel belongs to: one read may
// take no longer than limit. A server that goes silent and keeps the connection would
// otherwise hold its reader for ever. what is for the error, which is of kind Transient.
func Watch(r io.ReadCloser, what string, limit time.Duration, cancel context.CancelFunc) *Reader {
	w := &Reader{ReadCloser: r, what: what, limit: limit, silent: new(atomic.Bool), cancel: cancel}
	w.timer = time.AfterFunc(limit, func() {
		w.silent.Store(true)
		cancel()
	})
	w.timer.Stop()
	return w
}

// Read implements [io.Reader].
func (w *Reader) Read(p []byte) (int, error) {
	w.timer.Reset(w.limit)
	n, err := w.ReadCloser.Read(p)
	w.timer.Stop()
	if err != nil {
		w.cancel() // nothing more comes; not everybody closes
	}
	if err != nil && w.silent.Load() {
		// The context's own error would say that somebody cancelled.
		err = fault.New(fault.Transient, fmt.Sprintf("fetch %s: no data arrived for %v", w.what, w.limit),
			"try again; check the network path to it")
	}
	return n, err
}

// Close implements [io.Closer].
func (w *Reader) Close() error {
	w.timer.Stop()
	err := w.ReadCloser.Close()
	w.cancel()
	return err
}
