package catalogue

import (
	"fmt"
	"hash/fnv"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/store"
)

// maxTries is the maximum number of builds of a failing cell in a row. A request or a success begins a new row. With
// the pauses of [retryTime], these builds take four weeks. A cause that lasts longer does not pass by itself.
const maxTries = 30

// retryTime returns when a failed cell may be queued again. tries is the field Tries of the cell's newest build; see
// [api.Build]. ended is the end of that build. After the third build and each later one, the cell is built again once a
// day. The time of day depends on the cell: the cells that failed in one outage must not all be built at once.
func retryTime(key store.CellKey, tries int, ended time.Time) time.Time {
	switch {
	case tries <= 1:
		return ended.Add(time.Hour)
	case tries == 2:
		return ended.Add(6 * time.Hour)
	}
	const day = 24 * time.Hour
	sum := fnv.New64a()
	fmt.Fprint(sum, key.BuildID, "/", key.Board, "/", key.Driver) // a hash's Write returns no error
	earliest := ended.Add(6 * time.Hour)
	at := earliest.Truncate(day).Add(time.Duration(sum.Sum64() % uint64(day)))
	if at.Before(earliest) {
		at = at.Add(day)
	}
	return at
}

// passes reports whether the cause of a build's failure may pass. If this server does not know the class of the
// failure, passes returns false: the server must not build again and again what fails each time.
func passes(b *api.Build) bool {
	class, err := fault.Parse(b.Class)
	return err == nil && class.Passes()
}

// mayRetry reports whether a failed cell may be queued again now. b is its newest build.
func mayRetry(key store.CellKey, b *api.Build, now time.Time) bool {
	if !passes(b) || b.Tries >= maxTries || b.FinishedAt == nil {
		return false
	}
	return !now.Before(retryTime(key, b.Tries, *b.FinishedAt))
}

// addNoTry adds a note to the reason and the hint of a failed cell if the server queues it no more by itself: it does
// not know the class of the failure, or has made maxTries builds.
func addNoTry(r *api.Resolution, k api.Kernel) {
	b := r.Build
	_, err := fault.Parse(b.Class)
	switch {
	case err != nil:
		r.Reason += "; this server does not know the class, and makes no automatic tries"
		r.Hint += "; then upgrade the server, or " + requestHint(k, r.Driver)
	case passes(b) && b.Tries >= maxTries:
		r.Reason += fmt.Sprintf("; no more automatic tries after %d builds", b.Tries)
		r.Hint += "; when the cause is gone, " + requestHint(k, r.Driver)
	}
}
