// Package listed checks an artifact against a signed list (snapshot), by the rules of a node's owner. With a missing or
// expired list, a node takes no new artifact, unless the rules make the list optional. The node keeps the artifacts
// that it has, except yanked ones.
package listed

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/snapshot"
)

// These are the reasons why an artifact is refused, for errors.Is.
var (
	ErrYanked      = errors.New("the artifact was yanked")
	ErrQuarantined = errors.New("the artifact is in quarantine")
	ErrUnlisted    = errors.New("the artifact is not in the snapshot")
	ErrStale       = errors.New("the snapshot is too old")
	ErrNone        = errors.New("there is no snapshot")
)

// Rule has the rules for a list and the last list; see policy.Snapshot.
type Rule struct {
	MaxAge                  time.Duration
	AllowUnlisted, Optional bool
	// Client fetches and verifies the list.
	Client *snapshot.Client

	mu sync.Mutex
	// last is the last valid list, or nil. read is true after the list was read from the disk or fetched. refreshErr is
	// the error of the last attempt.
	last       *list
	read       bool
	refreshErr error
}

// list has the parts of a snapshot that Check needs.
type list struct {
	version         int64
	madeAt, expires time.Time
	published       map[string]struct{}
	withdrawn       map[string]snapshot.Artifact
	former          bool // signed under a former root: only its withdrawals count
}

func listOf(s *snapshot.Snapshot) *list {
	if s == nil {
		return nil
	}
	l := &list{
		s.Version, s.MadeAt, s.Expires,
		make(map[string]struct{}, len(s.Artifacts)), map[string]snapshot.Artifact{}, s.Former,
	}
	for _, a := range s.Artifacts {
		if a.State == snapshot.Published {
			l.published[a.Digest] = struct{}{}
		} else {
			l.withdrawn[a.Digest] = a
		}
	}
	return l
}

// Refresh fetches the newest list. If that fails, the last list stays valid.
func (r *Rule) Refresh(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, err := r.Client.Refresh(ctx)
	if r.refreshErr = err; err == nil {
		r.last, r.read = listOf(s), true
	}
	return err
}

// Check implements [trust.Listing]. A zero time means that the node already has the artifact. Check then refuses the
// artifact only if it was yanked.
func (r *Rule) Check(digest string, now time.Time) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.read {
		s, err := r.Client.Last()
		r.last, r.read = listOf(s), true
		if r.refreshErr == nil {
			r.refreshErr = err
		}
	}
	if r.last != nil {
		if a, ok := r.last.withdrawn[digest]; ok && (a.State == snapshot.Yanked || !now.IsZero()) {
			return "", r.withdrawn(a)
		}
	}
	if now.IsZero() {
		return "not withdrawn, as far as this node knows", nil
	}
	if err := r.checkUsable(now); err != nil {
		if r.Optional && meansNoList(err) {
			return "not withdrawn, as far as this node knows: " + err.Error(), nil
		}
		return "", err
	}
	name := fmt.Sprintf("snapshot %d of %s", r.last.version, r.last.madeAt.UTC().Format(time.RFC3339))
	if _, ok := r.last.published[digest]; ok {
		return "published in " + name, nil
	}
	if r.AllowUnlisted {
		return "not withdrawn in " + name, nil
	}
	return "", fault.Wrap(
		fault.Unverified,
		fmt.Errorf("%w: snapshot %d of %s", ErrUnlisted, r.last.version, r.last.madeAt.UTC().Format(time.RFC3339)),
		"if the artifact is newer than the snapshot, make a new snapshot: builder snapshot make; else install another "+
			"driver: --driver VERSION",
	)
}

func (r *Rule) withdrawn(a snapshot.Artifact) error {
	err := ErrYanked
	if a.State == snapshot.Quarantined {
		err = ErrQuarantined
	}
	if a.Reason != "" {
		err = fmt.Errorf("%w: %.200s", err, a.Reason)
	}
	hint := "install another driver: --driver VERSION"
	if a.Replacement != "" {
		hint = "install its replacement: --driver " + a.Replacement
	}
	return fault.Wrap(fault.Unverified, fmt.Errorf("snapshot %d says that %w", r.last.version, err), hint)
}

// meansNoList reports whether an error says that no valid list is available. Optional tolerates only these errors,
// never a list that fails verification.
func meansNoList(err error) bool {
	return fault.Is(err, fault.Transient) || errors.Is(err, ErrNone) || errors.Is(err, ErrStale) ||
		errors.Is(err, snapshot.ErrExpired)
}

// skew is how far a list's time may be ahead of this machine's clock.
const skew = 24 * time.Hour

// checkUsable returns the reason why the last list cannot decide about a new artifact, or nil.
func (r *Rule) checkUsable(now time.Time) error {
	kind, hint := fault.Unverified, ""
	if r.refreshErr != nil {
		// A list that fails verification is never ignored.
		if kind = fault.Of(r.refreshErr); kind != fault.Transient {
			return r.refreshErr
		}
		hint = fault.Hint(r.refreshErr)
	}
	fail := func(why error, next string) error {
		if r.refreshErr != nil {
			why, next = fmt.Errorf("%w, and no newer snapshot could be fetched: %w", why, r.refreshErr), hint
		}
		return fault.Wrap(kind, why, next)
	}
	const again = "make a new snapshot (builder snapshot make), or renew an unchanged one (builder snapshot refresh); " +
		"then run fetcher again"
	switch l := r.last; {
	case l == nil:
		return fail(ErrNone, again)
	case l.former:
		return fail(fmt.Errorf("%w that is signed under the present trusted root", ErrNone), again)
	case now.After(l.expires):
		return fail(fmt.Errorf("%w: the snapshot expired on %s", ErrStale, l.expires.UTC().Format(time.RFC3339)), again)
	case l.madeAt.After(now.Add(skew)):
		return fault.Wrap(
			fault.Unverified,
			fmt.Errorf(
				"%w, or the clock of this machine is wrong: the snapshot was made at %s, and this machine has the time %s",
				ErrStale,
				l.madeAt.UTC().Format(time.RFC3339),
				now.UTC().Format(time.RFC3339),
			),
			"set the clock of this machine",
		)
	case r.MaxAge > 0 && now.Sub(l.madeAt) > r.MaxAge:
		return fail(
			fmt.Errorf(
				"%w: the snapshot was made on %s, and the policy allows an age of %v",
				ErrStale,
				l.madeAt.UTC().Format(time.RFC3339),
				r.MaxAge,
			),
			again,
		)
	}
	return nil
}
