// Package discover reads upstream sources and records what exists: COS builds with their driver lists, GKE versions,
// and NVIDIA's releases. A source that fails is tried again at the next interval. The package requests no builds, and
// removes no kernels and no drivers.
package discover

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/store"
)

// catalogue records what was found.
type catalogue interface {
	Kernels(ctx context.Context, f store.KernelFilter, p store.Page) ([]api.Kernel, string, error)
	RecordKernel(ctx context.Context, k api.Kernel) error
	RecordDrivers(ctx context.Context, all []api.DriverRelease) error
	SawGKE(ctx context.Context, versions map[string][]string) error
}

// Source is a place that lists kernels, drivers or GKE versions.
type Source interface {
	// Name returns a word for the source's entries, for the log.
	Name() string
	// Look reads the source once, records its entries and returns their number. If it returns an error, it has recorded
	// what it could read.
	Look(ctx context.Context, to catalogue) (n int, err error)
}

// Config says which sources are read, and how often.
type Config struct {
	// Sources has the sources in the order in which they are read.
	Sources []Source
	// Every is the pause between two readings of all sources; 0 means 15 minutes.
	Every     time.Duration
	Catalogue catalogue
	// Found is called after each reading of the sources, even an incomplete one; nil means no call.
	Found func(context.Context)
	Log   *slog.Logger
}

// Run reads the sources at once, and then at intervals until ctx is done.
func Run(ctx context.Context, c Config) error {
	if len(c.Sources) == 0 {
		return nil
	}
	every := c.Every
	if every <= 0 {
		every = 15 * time.Minute
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		begin := time.Now()
		counts, err := Scan(ctx, c)
		var found []any
		for _, s := range c.Sources {
			found = append(found, s.Name(), counts[s.Name()])
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			c.Log.WarnContext(ctx, "discovery incomplete", append(found, "err", err, "hint", fault.Hint(err))...)
		default:
			took := time.Since(begin).Round(time.Millisecond).String()
			c.Log.InfoContext(ctx, "discovery done", append(found, "took", took)...)
		}
		if c.Found != nil {
			c.Found(ctx)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Scan reads each source once. It returns the number of entries for each source's name.
func Scan(ctx context.Context, c Config) (counts map[string]int, err error) {
	counts = map[string]int{}
	for _, s := range c.Sources {
		n, trouble := s.Look(ctx, c.Catalogue)
		counts[s.Name()] += n
		err = errors.Join(err, trouble)
	}
	return counts, err
}
