package catalogue

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// maxUnknown is the maximum number of kernels that wait for their lookup. maxMissed is the maximum number of remembered
// misses. missedFor is the pause before a missed kernel is looked up again. lookUpTime is the time limit of a lookup.
const (
	maxUnknown = 64
	maxMissed  = 10000
	missedFor  = 2 * time.Minute
	lookUpTime = time.Minute
)

// lookups are the lookups of kernels in the mirror: those under way, and those that failed.
type lookups struct {
	running singleflight.Group // by BUILD_ID

	mu     sync.Mutex
	missed map[string]miss // by kernel
}

// miss is a failed lookup.
type miss struct {
	at  time.Time
	err error
}

// recentMiss returns the error of a kernel's lookup that failed less than missedFor ago, or nil.
func (c *Catalogue) recentMiss(k target.Kernel) error {
	c.lookups.mu.Lock()
	defer c.lookups.mu.Unlock()
	if m, ok := c.lookups.missed[k.String()]; ok && c.Now().Sub(m.at) < missedFor {
		return m.err
	}
	return nil
}

// remember stores a failed lookup.
func (c *Catalogue) remember(k target.Kernel, err error) {
	c.lookups.mu.Lock()
	defer c.lookups.mu.Unlock()
	if c.lookups.missed == nil || len(c.lookups.missed) >= maxMissed { // an attacker may ask for many kernels
		c.lookups.missed = map[string]miss{}
	}
	c.lookups.missed[k.String()] = miss{c.Now(), err}
}

// find returns a kernel with its cells. If the catalogue lacks the kernel, find looks it up in the mirror, but not
// sooner than missedFor after a failure. Without a mirror, find returns a kernel without cells, and known is false.
func (c *Catalogue) find(ctx context.Context, k target.Kernel) (cells *store.KernelCells, known bool, err error) {
	none := &store.KernelCells{Kernel: api.Kernel{Kernel: k}}
	cells, err = c.Store.KernelCells(ctx, k.BuildID, k.Board)
	if err != nil || cells != nil {
		return cells, err == nil, err
	}
	if c.Mirror == nil {
		return none, false, nil
	}
	if err := c.recentMiss(k); err != nil {
		return none, false, err
	}
	if err := c.lookUp(ctx, k.BuildID); err != nil {
		if ctx.Err() == nil {
			c.remember(k, err)
		}
		return none, false, err
	}
	cells, err = c.Store.KernelCells(ctx, k.BuildID, k.Board)
	if err == nil && cells == nil {
		err = fault.New(
			fault.InputMissing,
			fmt.Sprintf("COS build %s has no kernel for board %s", k.BuildID, k.Board),
			"take the board from CHROMEOS_RELEASE_BOARD in /etc/lsb-release",
		)
		c.remember(k, err)
	}
	return cells, err == nil, err
}

// findKnown returns a kernel of the catalogue with its cells. For another kernel, it returns an error at once, and the
// kernel is looked up in the mirror later: a slow mirror must not delay nodes.
func (c *Catalogue) findKnown(ctx context.Context, k target.Kernel) (cells *store.KernelCells, known bool, err error) {
	cells, err = c.Store.KernelCells(ctx, k.BuildID, k.Board)
	if err != nil || cells != nil {
		return cells, err == nil, err
	}
	if c.Mirror == nil || fault.Is(c.recentMiss(k), fault.InputMissing) {
		return nil, false, fault.New(
			fault.Forbidden,
			"the catalogue does not know kernel "+k.String()+" yet",
			"ask the holder of a token with scope announce to run: server announce "+k.BuildID,
		)
	}
	c.lookUpLater(k)
	// After an error of this kind, nodes wait and ask again.
	return nil, false, fault.New(
		fault.TooMany,
		"the catalogue does not know kernel "+k.String()+" yet; the server looks for it in its mirror",
		"ask again in a minute",
	)
}

// lookUp reads a COS build from the mirror, and records its kernels for all boards. Callers that ask for the same COS
// build at the same time share one lookup.
func (c *Catalogue) lookUp(ctx context.Context, buildID string) error {
	for {
		_, err, shared := c.lookups.running.Do(buildID, func() (any, error) {
			limited, cancel := context.WithTimeout(ctx, lookUpTime)
			defer cancel()
			return nil, c.readMirror(limited, buildID)
		})
		if shared && errors.Is(err, context.Canceled) && ctx.Err() == nil {
			continue // the caller whose lookup this was has gone
		}
		return err
	}
}

func (c *Catalogue) readMirror(ctx context.Context, buildID string) error {
	all, err := c.Mirror.Build(ctx, buildID)
	if err != nil {
		return err
	}
	for _, k := range all {
		if err := c.RecordKernel(ctx, k); err != nil {
			return err
		}
	}
	return nil
}

// lookUpLater stores an unknown kernel for [Catalogue.LookUpUnknown]. The number of stored kernels is limited, because
// anybody can ask.
func (c *Catalogue) lookUpLater(k target.Kernel) {
	if c.Mirror == nil || c.recentMiss(k) != nil {
		return
	}
	select {
	case c.unknown <- k:
	default: // the list is full
	}
}

// LookUpUnknown looks up the unknown kernels that nodes asked for, until ctx is done. A kernel that was not found is
// looked up again only after missedFor.
func (c *Catalogue) LookUpUnknown(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case k := <-c.unknown:
			if c.recentMiss(k) != nil {
				continue
			}
			if _, _, err := c.find(ctx, k); err != nil && ctx.Err() == nil {
				c.Log.InfoContext(ctx, "kernel not found", "kernel", k.String(), "err", err)
			}
		}
	}
}
