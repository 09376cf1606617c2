package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// attemptsFile tells of sets whose loading did not end well, or has not ended.
const attemptsFile = ".prebake/attempts.json"

// maxTries is how often a set may fail, or take the node down, before it is refused.
const maxTries = 2

// maxAttempts bounds the file; the oldest are forgotten.
const maxAttempts = 32

// attempt is what happened to putting a set in force. It is written and flushed before
// anything is switched, unloaded or loaded, so that the next run, after a kill or
// a panic, knows what was there before.
type attempt struct {
	// Open says that it began and has not ended; Before is what was in force then, and
	// BootID the boot of the node in which it began.
	Open   bool             `json:"open,omitempty"`
	Before install.Pointers `json:"before"`
	BootID string           `json:"bootId,omitempty"`
	At     time.Time        `json:"at"`
	// Crashes counts the boots that ended while it was open, Failures the times that it
	// ended with an error, of which Why is the last.
	Crashes  int    `json:"crashes,omitempty"`
	Failures int    `json:"failures,omitempty"`
	Reason   string `json:"why,omitempty"`
	// ByHand says that somebody rolled it back.
	ByHand bool `json:"byHand,omitempty"`
	// Foreign are the modules of the driver that somebody else had loaded in that boot, and
	// that was to be unloaded: what is loaded again if this set does not do.
	Foreign       []host.Module `json:"foreign,omitempty"`
	ForeignDriver string        `json:"foreignDriver,omitempty"`
	// Firmware is where the kernel looked for its firmware.
	Firmware string `json:"firmware,omitempty"`
	// Next says that it waits for a kernel without a driver: the one that was loaded could
	// not be unloaded.
	Next bool `json:"next,omitempty"`
}

// attempts are by the digest of the set.
type attempts map[string]*attempt

// refused says why a set is not tried again until somebody says so. Failures, and a
// rollback, count only where another set is good: a node without a driver has nothing
// to lose.
func (a *attempt) refused(d target.Driver, other bool) error {
	why := ""
	switch {
	case a.ByHand && other:
		why = "was rolled back by hand on " + a.At.UTC().Format(time.DateTime)
	case a.Crashes >= maxTries:
		why = fmt.Sprintf("took the node down %d times while it was loaded, the last time after %s", a.Crashes,
			a.At.UTC().Format(time.DateTime))
	case a.Failures >= maxTries && other:
		why = fmt.Sprintf("failed %d times, the last time with: %s", a.Failures, a.Reason)
	default:
		return nil
	}
	return fault.New(fault.Rejected, fmt.Sprintf("driver %s %s", d, why),
		"try it again with fetcher install --retry, or ask for another version with --driver")
}

// readAttempts reads what is on disk. A file that is damaged tells nothing.
func readAttempts(store *install.Store) (attempts, error) {
	all := attempts{}
	if store == nil {
		return all, nil
	}
	raw, err := store.ReadFile(attemptsFile)
	if err != nil || raw == nil {
		return all, err
	}
	if json.Unmarshal(raw, &all) != nil {
		return attempts{}, nil
	}
	for digest, a := range all {
		if _, err := target.ParseFingerprint(digest); err != nil || a == nil { // digests have the same form
			delete(all, digest)
		}
	}
	return all, nil
}

func (all attempts) write(store *install.Store) error {
	digests := make([]string, 0, len(all))
	for digest := range all {
		digests = append(digests, digest)
	}
	slices.SortFunc(digests, func(x, y string) int { return all[y].At.Compare(all[x].At) })
	for _, digest := range digests[min(len(digests), maxAttempts):] {
		delete(all, digest)
	}
	raw, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	return store.WriteFile(attemptsFile, append(raw, '\n'))
}

// lacksForeign reports whether a run that was killed in this boot left a kernel without the
// driver that somebody else had loaded, where nothing of ours was in force.
func (a *attempt) lacksForeign(s nodeState, boot string) bool {
	return len(s.facts.Modules) == 0 && len(a.Foreign) > 0 && a.BootID == boot && a.Before.Current == ""
}

// restoreForeign loads what somebody else had loaded in this boot, where a run that was
// killed had unloaded it, and nothing of ours took its place.
func (a *Agent) restoreForeign(ctx context.Context, r *Report, store *install.Store, s nodeState) error {
	for digest, at := range s.attempts {
		if !at.lacksForeign(s, a.bootID()) {
			continue
		}
		files := a.findForeign(s.facts, at.ForeignDriver, at.Foreign)
		defer files.close()
		if err := restore(store, at.Before, nil); err != nil {
			return err
		}
		if err := a.writeFirmware(at.Firmware, s.facts); err != nil {
			return err
		}
		if err := files.reload(ctx, a, r); err != nil {
			return err
		}
		return a.note(store, digest, func(at *attempt) { at.Foreign, at.ForeignDriver, at.Firmware = nil, "", "" })
	}
	return nil
}

// begin notes that a set is about to be put in force, and what is unloaded for it.
func (a *Agent) begin(store *install.Store, digest string, before install.Pointers, was *foreignFiles,
	firmware string) error {
	err := a.note(store, digest, func(at *attempt) {
		at.Open, at.Before, at.BootID = true, before, a.bootID()
		at.Foreign, at.ForeignDriver, at.Firmware = was.modules, was.driver, firmware
	})
	if err != nil {
		return err
	}
	return store.Sync()
}

// end notes what happened to it; nil forgets all that was recorded against the set. That
// the disk is full must not leave it open.
func (a *Agent) end(store *install.Store, digest string, failed error) error {
	if failed == nil {
		all, err := readAttempts(store)
		if err != nil || all[digest] == nil {
			return err
		}
		delete(all, digest)
		for _, at := range all { // another one that was open, or waited, is over with this
			at.Open, at.Next = false, false
		}
		if err := all.write(store); err != nil {
			return store.RemoveFile(attemptsFile)
		}
		return nil
	}
	mods, err := host.LoadedModules(a.node)
	empty := err != nil || len(mods) == 0
	return a.note(store, digest, func(at *attempt) {
		if at.Open, at.Next = false, false; !empty { // else what was there is still to be put back
			at.Foreign, at.ForeignDriver, at.Firmware = nil, "", ""
		}
		// What says nothing about the driver does not count against it.
		for _, kind := range []fault.Kind{fault.Busy, fault.Transient, fault.DiskFull} {
			if fault.Is(failed, kind) {
				return
			}
		}
		if errors.Is(failed, context.Canceled) {
			return
		}
		at.Failures++
		at.Reason = strings.ToValidUTF8(failed.Error(), "?")
		at.Reason = at.Reason[:min(len(at.Reason), 2000)]
	})
}

// noteNext has one set wait for a kernel without a driver, and no other.
func (a *Agent) noteNext(store *install.Store, digest string) error {
	all, err := readAttempts(store)
	if err != nil {
		return err
	}
	if all[digest] == nil {
		all[digest] = &attempt{}
	}
	for other, at := range all {
		at.Next = other == digest
	}
	all[digest].At = a.parts.Now().UTC()
	return all.write(store)
}

func (a *Agent) note(store *install.Store, digest string, change func(*attempt)) error {
	all, err := readAttempts(store)
	if err != nil {
		return err
	}
	at := all[digest]
	if at == nil {
		at = &attempt{}
		all[digest] = at
	}
	change(at)
	at.At = a.parts.Now().UTC()
	return all.write(store)
}

// recover ends what earlier runs left open, the newest first: a driver that is loaded in
// this very boot stays for the next step to judge, and everything else is again as it
// was before.
func (a *Agent) recover(ctx context.Context, r *Report, store *install.Store) error {
	all, err := readAttempts(store)
	if err != nil { // no note is worth more than the driver that is in force
		a.parts.Log.WarnContext(ctx, "read attempts", "err", err)
		return nil
	}
	var open []string
	for digest, at := range all {
		if at.Open {
			open = append(open, digest)
		}
	}
	slices.SortFunc(open, func(x, y string) int { return all[y].At.Compare(all[x].At) })
	for _, digest := range open {
		at := all[digest]
		facts, err := host.Observe(a.node)
		if err != nil {
			return err
		}
		set, err := store.Set(digest)
		if err != nil {
			return err
		}
		a.parts.Log.WarnContext(ctx, "an earlier run did not end", "digest", digest, "began", at.At)
		if set != nil {
			a.addHistory(ctx, store, eventUnfinished, set, "", nil)
		}
		switch crashed := at.BootID != a.bootID(); {
		case set != nil && !crashed && (nodeState{facts: facts}).runs(set):
			if err := store.Switch(digest); err != nil {
				return err
			}
			continue // open still: whether a GPU works with it is not known
		case crashed:
			at.Crashes++
		default:
			at.Failures++
			at.Reason = "the program ended while the driver was loaded"
		}
		at.Open = false
		if at.Before.Current != "" || set == nil || at.Crashes >= maxTries {
			if err := restorePointers(store, at.Before); err != nil {
				return err
			}
			r.did("rolled back %s, which an earlier run did not finish", short(digest))
		}
	}
	if len(open) > 0 {
		if err := all.write(store); err != nil { // a full disk is no reason to stay without a driver
			a.parts.Log.WarnContext(ctx, "record attempts", "err", err)
		}
	}
	return nil
}

// restorePointers puts what was in force before an attempt in force again. Where that is gone,
// what is in force stays.
func restorePointers(store *install.Store, to install.Pointers) error {
	if to.Current == "" {
		return restore(store, install.Pointers{}, nil)
	}
	before, err := store.SetAt(to.Current)
	if err != nil || before == nil {
		return nil
	}
	if previous, err := store.SetAt(to.Previous); err != nil || previous == nil {
		to.Previous = ""
	}
	return restore(store, to, before)
}
