// Package stall ends downloads that receive no data any more. It does not know the protocol, and it does not retry.
package stall

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// Reader is a stream that ends with an error when no data arrives.
type Reader struct {
	io.ReadCloser
	what   string
	limit  time.Duration
	timer  *time.Timer // runs during a Read
	silent *atomic.Bool
	cancel context.CancelFunc
}

// Watch guards a download against a server that keeps the connection open and sends nothing. A Read that takes longer
// than limit fails with an error of kind Transient. To end the Read, Watch calls cancel, which must cancel the context
// of the download. The error contains the given name of the download.
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
		w.cancel() // no more data is expected, and not every caller closes the stream
	}
	if err != nil && w.silent.Load() {
		// The error of a cancelled context would read as if a person had cancelled.
		err = fault.New(fault.Transient, fmt.Sprintf("fetch %s: no data arrived for %v", w.what, w.limit),
			"try again; check the network path to the server")
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
