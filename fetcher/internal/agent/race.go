package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// mayBuild reports whether this node should compile a driver that is not published. It should not if:
//
//   - the owner wants one artifact by its digest;
//   - a foreign driver stays loaded;
//   - the active driver matches the wish and the named driver (see servesNamed), and is verified or loaded.
//
// named is the driver that the farm named, or the zero value.
func (a *Agent) mayBuild(ctx context.Context, store *install.Store, facts *host.Facts, current *install.Set,
	named target.Driver) bool {
	if a.parts.Local == nil || a.pin() != "" {
		return false
	}
	s, err := a.readState(ctx, store)
	if err != nil || s.keepsForeign() {
		return false
	}
	return !servesNamed(current, a.question(facts), named) || !a.verifiable(store, current, facts) && !s.runs(current)
}

// madeBefore returns a driver on the disk that this node compiled for the present wish. Its artifact must still exist.
// Such a driver waits for an idle GPU, or is refused. With --retry, the node compiles a refused driver again. With a
// GPU type, only the driver that the farm named counts, because the node may have compiled another one for another
// type. If the farm named none, only a driver that was compiled for the same wish counts.
func (a *Agent) madeBefore(ctx context.Context, store *install.Store, named target.Driver) *install.Set {
	s, err := a.readState(ctx, store)
	if err != nil {
		return nil
	}
	_, gpu := s.question.Wish.GPU()
	for _, set := range s.staged {
		if gpu != "" && named.Version == "" && set.Wish != s.question.Wish {
			continue
		}
		if set.Origin != install.MadeHere || !servesNamed(set, s.question, named) || !s.acceptable(set) {
			continue
		}
		at := s.attempts[set.Digest]
		if a.cfg.Retry && at != nil && at.refused(set.Driver, true, s.labelled, s.pin) != nil {
			continue
		}
		repo, err := a.parts.Open(set.Repository)
		if err == nil {
			_, err = repo.Manifest(ctx, set.Digest)
		}
		if err == nil {
			return set
		}
		a.parts.Log.WarnContext(ctx, "could not find the artifact that this node compiled", "digest", set.Digest, "err", err)
	}
	return nil
}

// nothingHeld is the release function of an artifact that this run did not compile. It does nothing.
func nothingHeld() error { return nil }

// resolve finds the artifact. If none is published and the node may compile, the answer is the driver that findMade
// returns. If findMade returns nil, the node compiles while it waits for the farm, and the first verified artifact
// wins. mayBuild and findMade get the driver that the farm named, or the zero value. The result release is never nil
// (see [localBuilder]).
func (a *Agent) resolve(ctx context.Context, facts *host.Facts, mayBuild func(target.Driver) bool,
	findMade func(target.Driver) *install.Set) (answer resolve.Answer, release func() error, err error) {
	release = nothingHeld
	if a.wanted.err != nil {
		return answer, release, a.wanted.err
	}
	q := a.question(facts)
	can := a.parts.Local != nil && q.Pin == ""
	compiles := can && mayBuild(target.Driver{})
	var made *install.Set
	patience := resolve.WaitLimits{Wait: a.wait,
		Progress: func(text string) { a.parts.Line.Progress("resolve", "%s", text) }}
	// With a GPU type, only an answer can show whether the node compiles.
	if _, gpu := q.Wish.GPU(); can && (compiles || gpu != "") && !a.cfg.DryRun {
		patience.Wait = 0
	}
	find := func() (err error) {
		answer, err = patience.Find(ctx, a.parts.Finder, q)
		compiles = compiles || err == nil && can && mayBuild(answer.Driver)
		return err
	}
	var grace time.Duration
	err = a.parts.Line.Do("resolve", func() (string, error) {
		err := find()
		if !compiles && patience.Wait < a.wait && (resolve.Passing(err) || err == nil && answer.Pending()) {
			patience.Wait = a.wait
			err = find()
		}
		if compiles && (err != nil || answer.Err() != nil) {
			made = findMade(answer.Driver)
		}
		switch {
		case err != nil && compiles && a.wait > 0 && !a.cfg.DryRun && resolve.Passing(err):
			if made != nil {
				return err.Error() + usesMade, nil
			}
			grace = min(a.wait/2, maxGrace)
			return fmt.Sprintf("%v; compiling on this node if this error lasts for %v", err, grace), nil
		case err != nil:
			return "", err
		case answer.Err() == nil:
			return fmt.Sprintf("%s from %s", answer.Driver, answer.Source), nil
		case !compiles || answer.State.Withdrawn():
			return string(answer.State), answer.Err()
		case made != nil:
			return string(answer.State) + usesMade, nil
		case a.cfg.DryRun:
			return string(answer.State) + "; would compile on this node", answer.Err()
		}
		return string(answer.State) + "; compiling on this node", nil
	})
	if err != nil || answer.Err() == nil {
		return answer, release, err
	}
	if made != nil {
		return madeAnswer(made), release, nil
	}
	err = a.parts.Line.Do("build", func() (string, error) {
		won, held, err := a.race(ctx, q, answer, facts, grace, findMade)
		if answer, release = won, held; err != nil {
			return "", err
		}
		if won.Source == resolve.SourceNode {
			return fmt.Sprintf("%s compiled on this node", won.Driver), nil
		}
		return fmt.Sprintf("%s from %s, which was first", won.Driver, won.Source), nil
	})
	return answer, release, err
}

// madeAnswer is the answer with a driver that this node compiled before.
func madeAnswer(set *install.Set) resolve.Answer {
	answer := keptAnswer(set)
	answer.Source = resolve.SourceNode
	return answer
}

const usesMade = "; using the driver that this node compiled before"

// maxGrace is how long a node waits for a silent farm before it compiles. A restart of the server must not make all
// nodes compile.
const maxGrace = 2 * time.Minute

// outcome is the result of the compile on this node (local), or of the farm.
type outcome struct {
	answer  resolve.Answer
	release func() error
	err     error
	local   bool
}

// race compiles on this node, and asks the farm at the same time if the owner lets the node wait.
//
//   - The compile begins after the grace time, or when the farm has no artifact.
//   - The first artifact stops the other side.
//   - A yanked or quarantined artifact stops the compile.
//
// race returns when both sides have ended. release is never nil. If the compiled artifact does not win, race calls the
// compile's own release.
func (a *Agent) race(
	ctx context.Context,
	q resolve.Question,
	answer resolve.Answer,
	facts *host.Facts,
	grace time.Duration,
	findMade func(target.Driver) *install.Set,
) (_ resolve.Answer, release func() error, err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	runners, ended, farmOver := 1, make(chan outcome, 2), make(chan struct{})
	go func() {
		local := q
		if answer.Driver.Flavour != "" && q.Flavour == resolve.Auto {
			local.Flavour = string(answer.Driver.Flavour)
		}
		select {
		case <-ctx.Done():
		case <-farmOver: // the farm has answered without an artifact
		case <-time.After(grace):
		}
		if ctx.Err() != nil {
			ended <- outcome{resolve.Answer{}, nil, context.Cause(ctx), true}
			return
		}
		if set := findMade(answer.Driver); set != nil { // another fetcher compiled it during the grace time
			ended <- outcome{madeAnswer(set), nil, nil, true}
			return
		}
		built, held, err := a.parts.Local.Build(ctx, local)
		ended <- outcome{built, held, err, true}
	}()
	if a.wait > 0 {
		runners++
		go func() {
			won, err := a.findArtifact(ctx, q, facts)
			if err == nil || won.State.Withdrawn() {
				stop()
			}
			close(farmOver)
			ended <- outcome{won, nil, err, false}
		}()
	}
	var won, yanked *resolve.Answer
	var errs [2]error // [0]: of this node, whose owner can repair it; [1]: of the farm
	held := nothingHeld
	for range runners {
		o := <-ended
		if o.release != nil {
			held = o.release
		}
		switch {
		case won != nil:
		case o.err == nil:
			won = &o.answer
			stop()
		case o.local:
			errs[0] = o.err
		default:
			errs[1] = o.err
			if o.answer.State.Withdrawn() { // withdrawn artifacts must not be compiled either
				yanked = &o.answer
			}
		}
	}
	if yanked == nil && won != nil && won.Source == resolve.SourceNode {
		return *won, held, nil
	}
	if err := held(); err != nil {
		a.parts.Log.WarnContext(ctx, "could not release the lock of the compile", "err", err)
	}
	switch {
	case yanked != nil:
		return *yanked, nothingHeld, errs[1]
	case won != nil:
		return *won, nothingHeld, nil
	case errs[1] == nil:
		return answer, nothingHeld, errs[0]
	}
	return answer, nothingHeld, fault.Wrap(
		fault.Of(errs[0]),
		fmt.Errorf("%w; the farm also gave no driver: %w", errs[0], errs[1]),
		fault.Hint(errs[0]),
	)
}

// findArtifact asks the farm until the farm offers an artifact that verifies. It gives up after an error that
// does not pass, and when the time to wait is over.
func (a *Agent) findArtifact(ctx context.Context, q resolve.Question, facts *host.Facts) (resolve.Answer, error) {
	say := func(text string) { a.parts.Line.Progress("build", "the farm: %s", text) }
	until := a.parts.Now().Add(a.wait)
	for pauses := resolve.Pauses(); ; {
		left := until.Sub(a.parts.Now())
		answer, err := resolve.WaitLimits{Wait: left, Progress: say}.Find(ctx, a.parts.Finder, q)
		if err == nil {
			err = answer.Err()
		}
		if err != nil {
			return answer, err
		}
		if _, _, _, _, err = a.judge(ctx, nil, answer, facts); err == nil {
			return answer, nil
		}
		if !resolve.Passing(err) || a.parts.Now().After(until) {
			a.parts.Log.WarnContext(ctx, "artifact of the farm not verified", "digest", answer.Digest, "err", err)
			return answer, err
		}
		say(err.Error())
		select {
		case <-ctx.Done():
			return answer, context.Cause(ctx)
		case <-time.After(pauses.NextBackOff()):
		}
	}
}
