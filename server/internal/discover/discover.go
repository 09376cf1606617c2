// Package discover asks upstream sources what exists, and tells the catalogue: COS
// builds and what their own lists name, which of them nodes of GKE boot, and NVIDIA's
// releases. Trouble with a source is logged and tried again, and blocks no other: a
// server without sources still serves what it has. It refuses to request builds and to
// remove kernels and drivers.
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

// catalogue takes what was found.
type catalogue interface {
	Kernels(ctx context.Context, f store.KernelFilter, p store.Page) ([]api.Kernel, string, error)
	RecordKernel(ctx context.Context, k api.Kernel) error
	RecordDrivers(ctx context.Context, all []api.DriverRelease) error
	SawGKE(ctx context.Context, versions map[string][]string) error
}

// Source is one place that tells what exists. Another one is another implementation.
type Source interface {
	// Name is what the source finds, in one word for the log.
	Name() string
	// Look reads the source once, records what it tells, and returns how many entries
	// that was. What could be read is recorded even when something else could not.
	Look(ctx context.Context, to catalogue) (n int, err error)
}

// Config says where to look.
type Config struct {
	// Sources are examined in this order.
	Sources []Source
	// Every is the pause between looks; 0 means 15 minutes.
	Every     time.Duration
	Catalogue catalogue
	// Found is called after each look that came to its end; nil means not.
	Found func(context.Context)
	Log   *slog.Logger
}

// Run reads the mirrors at once and then again and again, until ctx is done.
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

// Scan reads each source once and returns how much each told, by its name.
func Scan(ctx context.Context, c Config) (counts map[string]int, err error) {
	counts = map[string]int{}
	for _, s := range c.Sources {
		n, trouble := s.Look(ctx, c.Catalogue)
		counts[s.Name()] += n
		err = errors.Join(err, trouble)
	}
	return counts, err
}
