package agent

import (
	"cmp"
	"context"

	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// wanted is the driver that a node should have. A run reads it once.
type wanted struct {
	wish target.Wish
	// labelled means that the node's label is the source of the wish, and not Config.Wish.
	labelled bool
	// known means that this run or an earlier one has read the label, or has found that the node has none.
	known bool
	// err is the reason why the wish is not known. The active driver then stays.
	err error
	// label returns the wish of the node's label, or "" if Config.Wish holds. nil means that no label counts.
	label func(ctx context.Context) (target.Wish, error)
}

// UseLabel sets the function that returns the wish of the node's label; "" means that the node has no label, so that
// Config.Wish holds. Each run calls it once. While the function returns an error, the active driver stays. After a
// passing error (see [resolve.Passing]), the last known wish holds.
func (a *Agent) UseLabel(label func(ctx context.Context) (target.Wish, error)) {
	a.wanted.label = label
}

// readWanted reads the node's label, if it counts.
func (a *Agent) readWanted(ctx context.Context) {
	w := &a.wanted
	if w.label == nil {
		return
	}
	own, err := w.label(ctx)
	w.err = nil
	switch {
	case err == nil:
		was := w.wish
		w.wish, w.labelled, w.known = cmp.Or(own, a.cfg.Wish), own != "", true
		if w.wish != was {
			a.parts.Log.InfoContext(ctx, "the wanted driver changed", "driver", w.wish, "was", was)
		}
	case w.known && resolve.Passing(err):
		a.parts.Log.WarnContext(ctx, "could not read the node's label, and keeps the last one", "err", err)
	default:
		w.err = err
		a.parts.Log.WarnContext(ctx, "the node's label does not say which driver is wanted, so the active driver stays",
			"err", err, "hint", fault.Hint(err))
	}
}

// pin returns the digest of the only wanted artifact, or "". If the node has a label, pin returns "", because the label
// overrides Config.Pin.
func (a *Agent) pin() string {
	if a.wanted.labelled {
		return ""
	}
	return a.cfg.Pin
}

// isWanted reports whether a driver that waits on the disk may become active. If the wish cannot be read at the moment,
// the driver may become active, because a run that knew the wish chose it.
func (a *Agent) isWanted(set *install.Set, q resolve.Question) bool {
	if a.wanted.err != nil {
		return resolve.Passing(a.wanted.err)
	}
	return serves(set, q)
}
