// Package discover reads upstream sources and records what exists: COS builds with their driver lists, the GKE
// versions whose nodes boot them, and NVIDIA's releases. An error of a source is logged and tried again, and does not
// stop the other sources. A server without sources still serves what it has. The package requests no builds and
// removes no kernels and drivers.
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
	// Name says what the source finds, in one word for the log.
	Name() string
	// Look reads the source once, records its entries and returns their number. It records what it could read, even if
	// something else failed.
	Look(ctx context.Context, to catalogue) (n int, err error)
}

// Config has the sources and when to read them.
type Config struct {
	// Sources are read in this order.
	Sources []Source
	// Every is the pause between two readings; 0 means 15 minutes.
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

// Scan reads each source once. It returns the number of entries by the source's name.
func Scan(ctx context.Context, c Config) (counts map[string]int, err error) {
	counts = map[string]int{}
	for _, s := range c.Sources {
		n, trouble := s.Look(ctx, c.Catalogue)
		counts[s.Name()] += n
		err = errors.Join(err, trouble)
	}
	return counts, err
}
