package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path"
	"strings"
	"time"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/pkg/target"
)

const historyFile = ".prebake/history.json"

// maxHistory is the maximum number of events in the file. The oldest events are dropped.
const maxHistory = 200

// These are the events in the life of a driver on this node.
const (
	eventInForce    = "activated"
	eventReverted   = "rolled back"
	eventUnfinished = "unfinished"
	eventRolledBack = "rolled back by hand"
)

// Event is one event of a driver on this node.
type Event struct {
	At     time.Time     `json:"at"`
	BootID string        `json:"bootId,omitempty"`
	What   string        `json:"what"`
	Driver target.Driver `json:"driver"`
	Digest string        `json:"digest"`
	// Verdict is the verdict after the event. Reason is the error that caused the event. Both may be "".
	Verdict string `json:"verdict,omitempty"`
	Reason  string `json:"why,omitempty"`
}

// addHistory adds an event to the history, and reports it to Parts.Tried. It only logs a failed write, because only
// people read the history.
func (a *Agent) addHistory(
	ctx context.Context,
	store *install.Store,
	what string,
	set *install.Set,
	verdict string,
	why error,
) {
	a.reportTried(what, set, verdict, why)
	e := Event{
		At:      a.parts.Now().UTC(),
		BootID:  a.bootID(),
		What:    what,
		Digest:  set.Digest,
		Driver:  set.Driver,
		Verdict: verdict,
	}
	if why != nil {
		e.Reason = strings.ToValidUTF8(why.Error(), "?")
		e.Reason = e.Reason[:min(len(e.Reason), 2000)]
	}
	all, err := readHistory(store)
	if err == nil {
		all = append(all, e)
		var raw []byte
		if raw, err = json.MarshalIndent(all[max(0, len(all)-maxHistory):], "", "  "); err == nil {
			err = store.WriteFile(historyFile, append(raw, '\n'))
		}
	}
	if err != nil {
		a.parts.Log.WarnContext(ctx, "could not write the history", "err", err)
	}
}

func readHistory(store *install.Store) ([]Event, error) {
	raw, err := store.ReadFile(historyFile)
	if err != nil || raw == nil {
		return nil, err
	}
	var all []Event
	if json.Unmarshal(raw, &all) != nil {
		return nil, nil // a damaged file counts as empty
	}
	return all, nil
}

// History returns the events of drivers on this node, the oldest first.
func (a *Agent) History() (all []Event, err error) {
	store, err := a.openInstalled()
	if errors.Is(err, fs.ErrNotExist) {
		return []Event{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	if all, err = readHistory(store); all == nil {
		all = []Event{}
	}
	return all, err
}

// Uninstall restores the node's state from before this program, and the files of another installer. If the driver is in
// use, it changes nothing and returns an error of kind Busy. The next call completes an uninstall that was killed.
func (a *Agent) Uninstall(ctx context.Context) (r *Report, err error) {
	r = &Report{DryRun: a.cfg.DryRun, Plan: []string{}, Modules: []kmod.Outcome{}}
	a.forget()
	defer func() { r.Phases = a.parts.Line.Phases() }()
	if _, err = a.observe(r); err != nil {
		return r, err
	}
	store, err := a.openInstalled()
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	if !store.Exists() { // it never existed, or a killed uninstall has almost removed it
		if !a.cfg.DryRun {
			err = store.Remove()
		}
		return r, err
	}
	if !a.cfg.DryRun {
		unlock, lockErr := store.Lock(googleLock)
		if lockErr != nil {
			return r, lockErr
		}
		defer func() { err = errors.Join(err, unlock()) }()
	}
	s, err := a.readState(ctx, store)
	if err != nil {
		return r, err
	}
	unload := !a.cfg.NoLoad && len(s.facts.Modules) > 0 && s.ownLoaded()
	if unload {
		if err := idle(s.facts); err != nil {
			return r, err
		}
	}
	if a.cfg.DryRun {
		r.did("remove %s from %s", describe(s.current), a.cfg.InstallDir)
		if unload {
			r.did("unload %s", s.facts.Driver)
		}
		return r, nil
	}
	if unload {
		if err := a.unload(ctx, r, s.facts); err != nil {
			return r, err
		}
	}
	if s.facts.FirmwarePath == path.Join(a.cfg.InstallDir, "firmware") {
		was, err := store.ReadFile(firmwareBefore)
		if err != nil {
			return r, err
		}
		if was == nil { // an older release stored no path: use that of the kernel command line
			was = []byte(host.BootedFirmwarePath(a.node))
		}
		if err := a.writeFirmwarePath(string(was)); err != nil {
			return r, err
		}
	}
	r.Changed = true
	mounted, err := store.ReadFile(execFile)
	if err != nil {
		return r, err
	}
	if err := a.undoBoot(r, store); err != nil {
		return r, err
	}
	if mounted != nil && string(mounted) == a.bootID() { // before store.Remove removes the record of the mount
		if err := store.RevokeExec(); err != nil {
			return r, err
		}
	}
	added := addedLibraries(store)
	if added { // before store.Remove removes the record: after a kill, the next run must repeat this
		a.hideLibraries(ctx, added)
	}
	a.describeGPUs(ctx, gpucheck.Verdict{})
	if err = store.Remove(); err == nil {
		r.did("remove %s from %s", describe(s.current), a.cfg.InstallDir)
	}
	if !added {
		a.hideLibraries(ctx, added)
	}
	return r, err
}

// firmwareBefore is the file with the kernel's firmware path from before this program changed that path.
const firmwareBefore = ".prebake/firmware-path"

func describe(set *install.Set) string {
	if set == nil {
		return "what is left"
	}
	return set.Driver.String()
}
