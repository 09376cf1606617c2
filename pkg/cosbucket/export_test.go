package cosbucket

import (
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
