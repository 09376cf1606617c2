package agent

import (
	"cmp"
	"context"
	"time"

	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// wanted is the driver that a node should have. A run reads it at its start.
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
// Config.Wish holds. Each run calls it once, again while it waits, and before it makes the wanted driver active (see
// awaitLabel and relabelled). While the function returns an error, the active driver stays. After a passing error (see
// [resolve.Passing]), the wish of the last successful read counts.
func (a *Agent) UseLabel(label func(ctx context.Context) (target.Wish, error)) {
	a.wanted.label = label
}

// awaitLabel reads the node's label again while no label is known and the error is passing, but at most for
// Config.Wait. Right after a boot, the cluster's network may not work yet. The rest of the time is for the farm.
func (a *Agent) awaitLabel(ctx context.Context) {
	if a.wanted.err == nil {
		return
	}
	until := a.parts.Now().Add(a.wait)
	defer func() { a.wait = min(a.wait, max(until.Sub(a.parts.Now()), 0)) }()
	for pauses := resolve.Pauses(); a.wanted.err != nil && resolve.Passing(a.wanted.err); {
		pause := pauses.NextBackOff()
		if a.parts.Now().Add(pause).After(until) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		a.readWanted(ctx)
	}
}

// readWanted reads the node's label, if it counts.
func (a *Agent) readWanted(ctx context.Context) {
	w := &a.wanted
	if w.label == nil {
		return
	}
	own, err := w.label(ctx)
	before := w.err
	w.err = nil
	switch {
	case err == nil:
		was := w.wish
		w.wish, w.labelled, w.known = cmp.Or(own, a.cfg.Wish), own != "", true
		if w.wish != was {
			a.parts.Log.InfoContext(ctx, "the wanted driver changed", "driver", w.wish, "was", was)
		}
	case before != nil && !resolve.Passing(before) && resolve.Passing(err): // such as after a malformed label
		w.err = before
		a.parts.Log.WarnContext(ctx, "could not read the node's label; the error of the last read still counts", "err", err,
			"last", before)
	case w.known && resolve.Passing(err):
		a.parts.Log.WarnContext(ctx, "could not read the node's label, and keeps the last one", "err", err)
	default:
		w.err = err
		a.parts.Log.WarnContext(ctx, "the node's label does not say which driver is wanted, so the active driver stays",
			"err", err, "hint", fault.Hint(err))
	}
}

// relabelled reads the node's label again, and reports whether the wish differs from the last one that this run read. A
// run may wait for the farm for minutes, and for an idle GPU for hours.
func (a *Agent) relabelled(ctx context.Context) bool {
	was := a.wanted
	a.readWanted(ctx)
	now := a.wanted
	return now.wish != was.wish || now.labelled != was.labelled || (now.err == nil) != (was.err == nil)
}

// isOutdated reports whether the node's label changed after this run read it, so that the run must not make the wanted
// driver active. The search for a driver, its compile or its download may have taken long. isOutdated does not read the
// label if the decision keeps the active driver.
func (a *Agent) isOutdated(ctx context.Context, r *Report, s nodeState, d decision) bool {
	if d.do == keep && s.current != nil && s.current.Digest == d.set.Digest {
		return false
	}
	r.Relabelled = a.relabelled(ctx)
	return r.Relabelled
}

// pin returns the digest of the only wanted artifact, or "". If the node has a label, pin returns "", because the label
// overrides Config.Pin.
func (a *Agent) pin() string {
	if a.wanted.labelled {
		return ""
	}
	return a.cfg.Pin
}

// wishText returns a wish as text. If the owner wants only one artifact, that is its digest.
func wishText(wish target.Wish, pin string) string { return cmp.Or(pin, string(wish)) }

// isWanted reports whether a driver that waits on the disk may become active. If the wish cannot be read at the moment,
// the driver may become active, because a run that knew the wish chose it. Otherwise the driver must wait for the
// present wish, or have the exact version or digest that is wanted. A match is not enough: almost every driver
// matches the wish default.
func (a *Agent) isWanted(set *install.Set, s nodeState) bool {
	if a.wanted.err != nil {
		return resolve.Passing(a.wanted.err)
	}
	at, q := s.attempts[set.Digest], s.question
	return serves(set, q) && (namesOne(q) || at == nil || at.Wish == "" || at.Wish == wishText(q.Wish, q.Pin))
}

// namesOne reports whether the question is for an exact version, or for one artifact by its digest.
func namesOne(q resolve.Question) bool {
	_, exact := q.Wish.Exact()
	return exact || q.Pin != ""
}

// bootOrder returns the drivers that start may load, in the order of their trial. Some may be nil.
func (a *Agent) bootOrder(s nodeState) []*install.Set {
	waiting, first, second := s.waiting(), s.current, s.previous
	if waiting != nil && !a.isWanted(waiting, s) {
		waiting = nil
	}
	if a.wanted.err == nil && namesOne(s.question) && serves(second, s.question) && !serves(first, s.question) {
		first, second = second, first
	}
	return []*install.Set{waiting, first, second}
}

// againTime is the longest time of askAgain. The GPU may be idle for a short time only.
const againTime = 5 * time.Second

// askAgain asks the farm again for the driver that an answer names, after a wait for an idle GPU: the driver may have
// been withdrawn during the wait. If the farm does not answer, or has no artifact now, the given answer counts, as it
// does for a driver that waits for a boot. A server's given answer also counts if now only a registry answers. none is
// the reason why the given answer has no artifact; then askAgain does not ask.
func (a *Agent) askAgain(ctx context.Context, q resolve.Question, answer resolve.Answer, none error) (resolve.Answer,
	error) {
	if none != nil {
		return answer, none
	}
	ask, cancel := context.WithTimeout(ctx, againTime)
	defer cancel()
	now, err := a.parts.Finder.Find(ask, q)
	switch {
	case err != nil:
		a.parts.Log.WarnContext(ctx, "could not ask for the driver again after the wait for an idle GPU", "err", err)
	case now.State.Withdrawn():
		return now, now.Err()
	case now.State == api.Published && (now.Source != resolve.SourceRegistry || answer.Source == now.Source):
		return now, nil
	}
	return answer, nil
}

// upToDate reports whether the driver that stays active matches the wish, so that the run succeeds without an artifact.
// silent is true if the farm offers no artifact. A yanked driver, a failed verification, a GPU type that the server
// does not know, and a web page or wrong bytes in place of a source are always errors.
func (a *Agent) upToDate(answer resolve.Answer, set *install.Set, s nodeState, silent bool) bool {
	switch {
	case s.wanted != nil || a.wanted.err != nil || !servesNamed(set, s.question, answer.Driver) ||
		answer.State == api.Yanked || lacksList(answer, s.question) || fault.Is(s.none, fault.WebPage) ||
		resolve.IsOtherService(s.none):
		return false
	case resolve.Passing(s.none):
		return true
	}
	return silent && !fault.Is(s.none, fault.Unverified) && !fault.Is(s.none, fault.Mismatch) &&
		!fault.Is(s.none, fault.Unsupported)
}

// servesNamed reports whether an installed driver matches the question and the driver that the farm named for it. With
// a GPU type, the version must be the named one: a driver with another version is from an earlier wish, because the
// lists of a COS build do not change. A named driver without a version matches each version.
func servesNamed(set *install.Set, q resolve.Question, named target.Driver) bool {
	_, gpu := q.Wish.GPU()
	return serves(set, q) && (gpu == "" || named.Version == "" || named.Version == set.Driver.Version)
}

// lacksList reports whether the server does not know the GPU type of the question on this COS build.
func lacksList(answer resolve.Answer, q resolve.Question) bool {
	_, gpu := q.Wish.GPU()
	return gpu != "" && answer.State == api.Unknown && answer.Source == resolve.SourceServer && answer.Driver.Version == ""
}

// isUnconfirmed reports whether the farm may name another driver than the installed one later. It is false for an exact
// version and for a digest, and if no source is configured.
func isUnconfirmed(answer resolve.Answer, set *install.Set, s nodeState) bool {
	if namesOne(s.question) || answer.Source == resolve.SourceNone {
		return false
	}
	return resolve.Passing(s.none) || answer.Driver.Version != set.Driver.Version
}

// withdraws reports whether the farm withdraws this driver. A server names the version alone, and only if it has no
// published artifact of that version for this node.
func withdraws(answer resolve.Answer, set *install.Set) bool {
	return answer.State.Withdrawn() && (answer.Digest == set.Digest || answer.Driver.Version == set.Driver.Version)
}

// dropUnwanted records that no driver waits for the next boot, if the driver that waits is not wanted any more, or if
// the farm's answer in the report withdraws it. It does nothing while the wish is not known, or while a rollback waits.
// It reports whether it tried to record this.
func (a *Agent) dropUnwanted(ctx context.Context, r *Report, store *install.Store, s nodeState) bool {
	set := s.waiting()
	if set == nil || a.wanted.err != nil || s.waitsForRollback() || a.isWanted(set, s) && !withdraws(r.Answer, set) {
		return false
	}
	a.parts.Log.InfoContext(ctx, "dropped the waiting driver", "driver", set.Driver,
		"digest", set.Digest)
	a.dropWaiting(ctx, r, store, s)
	return true
}

// dropWaiting records that no driver waits for the next boot, unless it is a driver to which an operator rolled back.
// It writes the records only if one changes.
func (a *Agent) dropWaiting(ctx context.Context, r *Report, store *install.Store, s nodeState) {
	if s.waitsForRollback() {
		return
	}
	r.Pending = ""
	all, err := readAttempts(store)
	changed := false
	for _, at := range all {
		changed = changed || at.Next
		at.Next = false
	}
	if err == nil && changed {
		err = a.writeAttempts(store, all)
	}
	if err != nil {
		a.parts.Log.WarnContext(ctx, "could not record that no driver waits", "err", err)
	}
}

// retryCommand returns the end of a hint: how to try a driver again. It names the driver and the flags of its source,
// because the command install reads no label, and in the manifests both are arguments of the command run. If the owner
// wants only one artifact, pin is its digest; otherwise it is "".
func retryCommand(d target.Driver, pin string) string {
	driver := cmp.Or(pin, d.Version)
	if pin == "" && d.Flavour != "" {
		driver += " --flavour " + string(d.Flavour)
	}
	return "run, with the --server or --registry of \"fetcher run\" if it has one: fetcher install --retry --driver " +
		driver
}
