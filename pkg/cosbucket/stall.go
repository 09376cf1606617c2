package cosbucket

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// stallLimit is how long one read of a download may take, resumptions
// included. A server that goes silent and keeps the connection would otherwise
// hold a builder for ever.
const stallLimit = 5 * time.Minute

// watched is an object's stream that ends when the bucket goes silent.
type watched struct {
	io.ReadCloser
	what   string
	timer  *time.Timer // running during a read
	silent *atomic.Bool
	cancel context.CancelFunc
}

// watch guards a stream that ends with the context that cancel belongs to.
func watch(r io.ReadCloser, what string, cancel context.CancelFunc) *watched {
	w := &watched{ReadCloser: r, what: what, silent: new(atomic.Bool), cancel: cancel}
	w.timer = time.AfterFunc(stallLimit, func() {
		w.silent.Store(true)
		cancel()
	})
	w.timer.Stop()
	return w
}

func (w *watched) Read(p []byte) (int, error) {
	w.timer.Reset(stallLimit)
	n, err := w.ReadCloser.Read(p)
	w.timer.Stop()
	if err != nil && w.silent.Load() {
		// The context's own error would say that somebody cancelled.
		err = fault.New(fault.Transient, fmt.Sprintf("fetch %s: nothing came for %v", w.what, stallLimit), "try again; check the network on the way to the bucket")
	}
	return n, err
}

func (w *watched) Close() error {
	w.timer.Stop()
	err := w.ReadCloser.Close()
	w.cancel()
	return err
}
