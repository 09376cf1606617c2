package cosbucket

import (
	"context"
	"io"
	"net/url"
	"time"
)

// OpenWebWithWait opens a web bucket whose retries come quickly.
func OpenWebWithWait(u *url.URL, wait time.Duration) (*Bucket, error) {
	b, err := openHTTP(u, wait)
	if err != nil {
		return nil, err
	}
	return &Bucket{b}, nil
}

// StallLimit is how long a read may take.
const StallLimit = stallLimit

// OpenSilent opens a bucket that sends two bytes of an object and then nothing.
func OpenSilent() *Bucket { return &Bucket{silent{}} }

type silent struct{ backend }

func (silent) url(name string) string { return "silent://" + name }

func (silent) get(ctx context.Context, _ string) (io.ReadCloser, Attrs, error) {
	r, w := io.Pipe()
	go func() {
		_, _ = w.Write([]byte("ab"))
		<-ctx.Done()
		_ = w.CloseWithError(ctx.Err())
	}()
	return r, Attrs{Size: 3}, nil
}
