package catalogue

import (
	"fmt"
	"hash/fnv"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/store"
)

// retryTime returns when a failed cell may be queued again. tries is the number of its newest build; see [api.Build].
// ended is the end of that build. From the third on it is once a day, at a time that depends on the cell: the cells of
// an outage must not all be built at once each day.
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

// mayRetry reports whether a failed cell may be queued again. b is its newest build.
func mayRetry(key store.CellKey, b *api.Build, now time.Time) bool {
	class, err := fault.Parse(b.Class)
	if err != nil || !class.Passes() || b.FinishedAt == nil {
		return false
	}
	return !now.Before(retryTime(key, b.Tries, *b.FinishedAt))
}
