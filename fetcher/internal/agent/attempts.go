package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// attemptsFile has a record of each driver with a failed or unfinished activation.
const attemptsFile = ".prebake/attempts.json"

// attemptsSize is the space for attemptsFile, in bytes, that is reserved on the disk. maxAttempts records need less.
const attemptsSize = 128 << 10

// maxTries is how often a driver may fail or crash the node before it is refused.
const maxTries = 2

// maxAttempts is the maximum number of records in attemptsFile (see [Agent.writeAttempts]).
const maxAttempts = 32

// attempt is the record of the activations of one driver. Write it before anything is switched, unloaded or loaded:
// after a crash, the next run needs it.
type attempt struct {
	// Open is true until the activation ends. Before has the pointers from before the activation. BootID is the boot in
	// which the activation began.
	Open   bool             `json:"open,omitempty"`
	Before install.Pointers `json:"before"`
	BootID string           `json:"bootId,omitempty"`
	At     time.Time        `json:"at"`
	// Crashes counts the boots that ended during an open activation. Failures counts the activations that ended with an
	// error. Reason is the last error.
	Crashes  int    `json:"crashes,omitempty"`
	Failures int    `json:"failures,omitempty"`
	Reason   string `json:"why,omitempty"`
	// ByHand means that an operator rolled the driver back.
	ByHand bool `json:"byHand,omitempty"`
	// Foreign lists the modules of the foreign driver that the activation unloads. ForeignDriver is that driver's name.
	Foreign       []host.Module `json:"foreign,omitempty"`
	ForeignDriver string        `json:"foreignDriver,omitempty"`
	// Firmware is the kernel's firmware path before the activation.
	Firmware string `json:"firmware,omitempty"`
	// Next means that this driver is loaded as soon as no other driver is, for example after a reboot.
	Next bool `json:"next,omitempty"`
	// Wish is the wish for which the driver with Next waits (see wishText). It is "" if an operator rolled back to this
	// driver, and in records of releases that did not store it.
	Wish string `json:"wish,omitempty"`
}

// attempts has the record of each driver, by the digest of the driver's artifact.
type attempts map[string]*attempt

// refused returns the reason why the driver d is not tried again without --retry, or nil. other is whether the node has
// another good driver. If other is false, only crashes count, not failures or a rollback. labelled is whether the
// node's label, which the hint then names, is the source of the wish. pin is as for retryCommand.
func (a *attempt) refused(d target.Driver, other, labelled bool, pin string) error {
	why := ""
	switch {
	case a.ByHand && other:
		why = "was rolled back by hand on " + a.At.UTC().Format(time.DateTime)
	case a.Crashes >= maxTries:
		why = fmt.Sprintf("took the node down %d times during its load; the last load began at %s", a.Crashes,
			a.At.UTC().Format(time.DateTime))
	case a.Failures >= maxTries && other:
		why = fmt.Sprintf("failed %d times, the last time with: %s", a.Failures, a.Reason)
	default:
		return nil
	}
	hint := "to get another version, set --driver; to try this driver again, "
	if labelled {
		hint = "to get another version, set the node's label to it; to try this driver again, "
	}
	return fault.New(fault.Rejected, fmt.Sprintf("driver %s %s", d, why), hint+retryCommand(d, pin))
}

// readAttempts reads attemptsFile. A damaged file counts as empty.
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
		if _, err := target.ParseFingerprint(digest); err != nil || a == nil { // a digest has the same format
			delete(all, digest)
		}
	}
	return all, nil
}

// reserve reserves disk space for the next records. Without the reserve, a full disk would lose the count of crashes,
// and a node would load a driver again and again that crashes it.
func (a *Agent) reserve(ctx context.Context, store *install.Store) {
	if err := errors.Join(store.Reserve(attemptsFile, []byte("{}\n"), attemptsSize),
		store.Reserve(recordFile, nil, recordSize)); err != nil {
		a.parts.Log.WarnContext(ctx, "could not reserve disk space for the records of activations", "err", err)
	}
}

// writeAttempts writes the records, at most maxAttempts. At worst, a driver whose record is dropped is tried maxTries
// times again, if the farm offers it again at all.
func (a *Agent) writeAttempts(store *install.Store, all attempts) error {
	if len(all) > maxAttempts {
		pointers, err := store.Pointers()
		if err != nil { // the need and the age then decide alone
			pointers = install.Pointers{}
		}
		for _, digest := range all.byNeed(a.parts.Now(), pointers)[maxAttempts:] {
			delete(all, digest)
		}
	}
	raw, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	return store.WriteReserved(attemptsFile, append(raw, '\n'), attemptsSize)
}

// maxRecent is the number of the newest records that are always kept. Otherwise, if maxAttempts other records were more
// important than the record of a new failure, that failure would never be counted, and the node would try the driver
// endlessly.
const maxRecent = 8

// byNeed returns the digests of all records, the least needed last. The newest maxRecent records come first. The others
// are sorted by attempt.need, the highest first. Among equals, the active and the previous driver come first, and then
// the newer records.
func (all attempts) byNeed(now time.Time, pointers install.Pointers) []string {
	digests := make([]string, 0, len(all))
	for digest := range all {
		digests = append(digests, digest)
	}
	// A record from the future was made while the clock was wrong. It counts as old: otherwise no new record could
	// replace it.
	future := func(digest string) int {
		if all[digest].At.After(now) {
			return 1
		}
		return 0
	}
	slices.SortFunc(digests, func(x, y string) int {
		return cmp.Or(cmp.Compare(future(x), future(y)), all[y].At.Compare(all[x].At))
	})
	place := map[string]int{}
	for i, digest := range digests {
		rank := 2 * all[digest].need()
		if pointers.Has(digest) {
			rank++
		}
		if i < maxRecent {
			rank = math.MaxInt16
		}
		place[digest] = i - rank*len(digests)
	}
	slices.SortFunc(digests, func(x, y string) int { return cmp.Compare(place[x], place[y]) })
	return digests
}

// need returns how important this record is: 2 if its activation is open or its driver waits (Next), 1 if it has a
// rollback, a crash or a foreign driver, else 0. The age alone must not decide: a clock that is wrong makes the newest
// record look like the oldest.
func (a *attempt) need() int {
	switch {
	case a.Open, a.Next:
		return 2
	case a.ByHand, a.Crashes > 0, len(a.Foreign) > 0:
		return 1
	}
	return 0
}

// lacksForeign reports whether a run in this boot unloaded a foreign driver, and no driver is loaded now. It is false
// if a driver of this program was active before that run.
func (a *attempt) lacksForeign(s nodeState, boot string) bool {
	return len(s.facts.Modules) == 0 && len(a.Foreign) > 0 && a.BootID == boot && a.Before.Current == ""
}

// restoreForeign loads a foreign driver again that a killed run unloaded in this boot. It does nothing if a driver of
// this program replaced the foreign driver.
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

// begin records that a driver's activation begins, and which foreign driver it unloads.
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

// end records the result of an activation. After a success, it deletes the record. An error counts against the driver
// only if blame is true and the error says something about the driver (see blames).
//
// If the file cannot be written, an open record would count as a crash after the next boot, so end deletes the whole
// file. But if the file has a record that must not be lost (see [attempts.precious]), the file stays, with the open
// record, and end returns the error. The next run then writes the file again.
func (a *Agent) end(store *install.Store, digest string, failed error, blame bool) error {
	all, err := readAttempts(store)
	if err != nil {
		return err
	}
	at := all[digest]
	open := at != nil && at.Open
	if failed == nil {
		if at == nil {
			return nil
		}
		delete(all, digest)
		for _, at := range all { // other open or waiting activations are obsolete now
			if at.Open && at.BootID != a.bootID() { // recover could not record that the node went down
				at.Crashes++
			}
			at.Open, at.Next = false, false
		}
		err := a.writeAttempts(store, all)
		switch {
		case err == nil || !open:
			return nil
		case all.precious(a.bootID()):
			return fmt.Errorf("record the end of the activation: %w", err)
		}
		return store.RemoveFile(attemptsFile)
	}
	blame = blame && blames(failed)
	if !blame && (at == nil || !at.Open && !at.Next && len(at.Foreign) == 0) {
		return nil // nothing to record
	}
	mods, err := host.LoadedModules(a.node)
	empty := err != nil || len(mods) == 0
	err = a.note(store, digest, func(at *attempt) {
		if at.Open, at.Next = false, false; !empty { // if no driver is loaded, the foreign one must be loaded again
			at.Foreign, at.ForeignDriver, at.Firmware = nil, "", ""
		}
		if blame {
			at.failed(failed)
		}
	})
	if err != nil && open && !all.precious(a.bootID()) {
		err = errors.Join(err, store.RemoveFile(attemptsFile))
	}
	return err
}

// failed counts a failure, and stores its reason.
func (a *attempt) failed(why error) {
	a.Failures++
	a.Reason = strings.ToValidUTF8(why.Error(), "?")
	a.Reason = a.Reason[:min(len(a.Reason), 2000)]
}

// blames reports whether an error of an activation says something about the driver.
func blames(failed error) bool {
	return !fault.Is(failed, fault.Busy) && !fault.Is(failed, fault.Transient) && !fault.Is(failed, fault.DiskFull) &&
		!errors.Is(failed, context.Canceled)
}

// precious reports whether a record has a rollback, a crash that may not be counted yet, or a foreign driver that must
// be loaded again.
func (all attempts) precious(boot string) bool {
	for _, at := range all {
		if at.ByHand || at.Crashes > 0 || len(at.Foreign) > 0 || at.Open && at.BootID != boot {
			return true
		}
	}
	return false
}

// noteNext sets Next in the record of the driver with this digest, for the present wish, and clears Next in all other
// records. If rolledBack is not "", the same write also records that an operator rolled back the driver with that
// digest. The driver with the given digest then waits whatever the wish is, while the rolled-back driver is loaded. At
// a boot it comes first only if it matches the wish, as far as the wish is known.
func (a *Agent) noteNext(store *install.Store, digest, rolledBack string) error {
	all, err := readAttempts(store)
	if err != nil {
		return err
	}
	now := a.parts.Now().UTC()
	for _, d := range []string{digest, rolledBack} {
		if d == "" {
			continue
		}
		if all[d] == nil {
			all[d] = &attempt{}
		}
		all[d].At = now
	}
	if rolledBack != "" {
		all[rolledBack].ByHand = true
	}
	for other, at := range all {
		if at.Next, at.Wish = other == digest, ""; at.Next && rolledBack == "" {
			at.Wish = wishText(a.wanted.wish, a.pin())
		}
	}
	if err := a.writeAttempts(store, all); err != nil || rolledBack == "" {
		return err
	}
	return store.Sync() // the operator is told that the rollback is noted, and may cut the power next
}

// rollbackDue reports whether an operator rolled the active driver back while it was in use, and the previous driver
// can replace it now. was is the result of the call before. If was is false, rollbackDue returns false while another
// installer works: that may be "fetcher rollback", which records its rollback before it starts it.
func (a *Agent) rollbackDue(ctx context.Context, was bool) bool {
	store, err := a.openInstalled()
	if err != nil {
		return false
	}
	defer func() { _ = store.Close() }() // nothing was written
	current, err := store.Current()
	all, aerr := readAttempts(store)
	if err != nil || aerr != nil || current == nil || all[current.Digest] == nil || !all[current.Digest].ByHand {
		return false
	}
	s, err := a.readState(ctx, store)
	if err != nil || !s.waitsForRollback() || s.refused(s.current) == nil || s.closed != "" || s.facts.Open() {
		return false
	}
	return was || a.locked(store, func() error { return nil }) == nil
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
	return a.writeAttempts(store, all)
}

// setAttempt replaces the record of a driver; nil removes it.
func (a *Agent) setAttempt(store *install.Store, digest string, at *attempt) error {
	all, err := readAttempts(store)
	if err != nil {
		return err
	}
	if delete(all, digest); at != nil {
		all[digest] = at
	}
	return a.writeAttempts(store, all)
}

// recover ends the activations that earlier runs left open, the newest first. A driver that was loaded in this boot
// stays. Otherwise recover restores the former state. If recover cannot record a crash, the driver must not be loaded
// again (see Agent.uncounted).
func (a *Agent) recover(ctx context.Context, r *Report, store *install.Store) error {
	a.uncounted = nil
	all, err := readAttempts(store)
	if err != nil { // an unreadable record must not endanger the active driver
		a.parts.Log.WarnContext(ctx, "could not read the record of activations", "err", err)
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
			continue // the record stays open until the driver is checked
		case crashed:
			at.Crashes++
		default:
			at.Failures++
			at.Reason = "fetcher ended during the load of the driver"
		}
		at.Open = false
		switch {
		case set == nil || at.Crashes >= maxTries || canReplace(store, at.Before.Current, facts):
			back, err := restorePointers(store, at.Before)
			if err != nil {
				return err
			}
			if back { // else the former driver is the same one, is gone, or was active still
				r.did("rolled back %s, which an earlier run did not finish", short(digest))
			}
		case (at.Before.Current != "" || len(at.Foreign) == 0) && len(facts.Modules) == 0 && fitsNode(set, facts) == nil:
			if err := store.Switch(digest); err != nil { // the run may have been killed before it switched
				return err
			}
		}
	}
	if len(open) > 0 {
		err := a.writeAttempts(store, all)
		if fault.NoSpace(err) {
			err = a.makeRoom(ctx, store, all, err)
		}
		if err != nil { // a full disk must not leave the node without a driver
			a.parts.Log.WarnContext(ctx, "could not write the record of activations", "err", err)
			a.uncounted = err
		}
	}
	return nil
}

// canReplace reports whether the former driver, at this path of [install.Pointers], can be loaded on this node. After
// an update of COS, the former driver does not fit. Then the new driver stays active, because it may be the only driver
// that fits.
func canReplace(store *install.Store, former string, facts *host.Facts) bool {
	if former == "" {
		return false
	}
	set, err := store.SetAt(former)
	return err == nil && set != nil && fitsNode(set, facts) == nil
}

// restorePointers makes the former driver active again. If that driver is no longer on the disk, the present driver
// stays active. back reports whether another driver was active before the call.
func restorePointers(store *install.Store, to install.Pointers) (back bool, err error) {
	was, err := store.Pointers()
	if err != nil {
		return false, err
	}
	back = was.Current != to.Current
	var before *install.Set
	if to.Current != "" {
		if before, err = store.SetAt(to.Current); err != nil || before == nil {
			return false, nil
		}
	}
	if previous, err := store.SetAt(to.Previous); err != nil || previous == nil {
		to.Previous = ""
	}
	return back, restore(store, to, before)
}
