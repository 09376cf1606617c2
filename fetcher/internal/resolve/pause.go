package resolve

import (
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// maxRetryAfter is the longest time of a Retry-After header that nodes obey.
const maxRetryAfter = 5 * time.Minute

// Passing reports whether the same question may get an answer later: a service did not respond, a web page responded in
// its place, or a service was asked too often.
func Passing(err error) bool {
	return fault.Is(err, fault.Transient) || fault.Is(err, fault.TooMany) || fault.Is(err, fault.WebPage)
}

// Pauses returns the pauses between two questions. They grow from 3 to 30 seconds. Each is changed at random by up to
// half, so that the nodes of a farm do not all ask at the same time, for example after an outage.
func Pauses() backoff.BackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval, b.RandomizationFactor = 3*time.Second, 30*time.Second, 0.5
	return b
}

// nextPause returns the pause after a question with the result err. If the server sent the Retry-After header,
// nextPause adds this time, at most maxRetryAfter, so that nodes that got the same value still do not come back
// together.
func nextPause(pauses backoff.BackOff, err error) time.Duration {
	return pauses.NextBackOff() + min(api.RetryAfter(err), maxRetryAfter)
}
