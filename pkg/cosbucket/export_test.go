package cosbucket

import (
	"context"
	"io"
	"time"
)

// OpenWithWait opens a bucket with this wait before the first retry.
func OpenWithWait(ctx context.Context, rawURL string, wait time.Duration) (*Bucket, error) {
	return open(ctx, rawURL, wait)
}

// Split is split, for tests.
var Split = split

// StallLimit is stallLimit, for tests.
const StallLimit = stallLimit

// RetryMax is retryMax, for tests.
const RetryMax = retryMax

// OpenSilent opens a bucket that sends two bytes of an object and then nothing.
func OpenSilent() *Bucket { return &Bucket{mirrors: []backend{silent{}}} }

type silent struct{ backend }

func (silent) url(name string) string { return "silent://" + name }

func (silent) open(ctx context.Context, _ string, _ int64, _ string) (io.ReadCloser, Attrs, error) {
	r, w := io.Pipe()
	go func() {
		_, _ = w.Write([]byte("ab"))
		<-ctx.Done()
		_ = w.CloseWithError(ctx.Err())
	}()
	return r, Attrs{Size: 3}, nil
}
