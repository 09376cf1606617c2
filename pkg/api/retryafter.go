package api

import (
	"errors"
	"net/http"
	"strconv"
	"time"
)

// retryAfterError is the error of a response with the Retry-After header.
type retryAfterError struct {
	error
	wait time.Duration
}

func (e retryAfterError) Unwrap() error { return e.error }

// RetryAfter returns how long the server wants the caller to wait before the next call; 0 means no wait, or no valid
// Retry-After header. The time is not bounded.
func RetryAfter(err error) time.Duration {
	var e retryAfterError
	if errors.As(err, &e) {
		return e.wait
	}
	return 0
}

// withRetryAfter adds the value of the response's Retry-After header (RFC 9110, 10.2.3) to an error. The value is a
// number of seconds, or a date.
func withRetryAfter(err error, resp *http.Response) error {
	text := resp.Header.Get("Retry-After")
	if n, bad := strconv.ParseUint(text, 10, 31); bad == nil {
		return retryAfterError{err, time.Duration(n) * time.Second}
	}
	if at, bad := http.ParseTime(text); bad == nil {
		return retryAfterError{err, max(0, time.Until(at))}
	}
	return err
}
