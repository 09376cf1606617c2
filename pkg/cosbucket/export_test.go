package cosbucket

import (
	"context"
	"io"
	"time"
)

// OpenWithWait opens a bucket that waits for the given time before it tries a request for the second time.
func OpenWithWait(ctx context.Context, rawURL string, wait time.Duration) (*Bucket, error) {
	return open(ctx, rawURL, wait)
}

// Split gives tests access to split.
var Split = split

// StallLimit gives tests access to stallLimit.
const StallLimit = stallLimit

// RetryMax gives tests access to retryMax.
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
