package agent

import (
	"context"
	"slices"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
)

// readState reads what a decision about the driver needs: the node's facts, the drivers on its disk, and the attempts.
func (a *Agent) readState(ctx context.Context, store *install.Store) (s nodeState, err error) {
	s = nodeState{replaceForeign: a.cfg.ReplaceForeign, allowDowngrade: a.cfg.AllowDowngrade, retry: a.cfg.Retry,
		noLoad: a.cfg.NoLoad, labelled: a.wanted.labelled, pin: a.pin()}
	if s.facts, err = host.Observe(a.node); err != nil {
		return s, err
	}
	if s.facts.Open() {
		if s.facts.Users, err = host.DeviceUsers(a.node); err != nil {
			a.parts.Log.WarnContext(ctx, "could not find out which processes use the GPU", "err", err)
		}
	}
	s.verifiable = func(set *install.Set) bool { return a.verifiable(store, set, s.facts) }
	s.closed = a.cfg.Maintenance.Closed(a.parts.Now())
	s.question = a.question(s.facts)
	if store == nil {
		s.verifiable = nil
	}
	if s.current, err = currentSet(store); err != nil || store == nil {
		s.attempts = attempts{}
		return s, err
	}
	// Errors in the following files are only logged: they must not endanger the active driver.
	if s.previous, err = store.Previous(); err != nil {
		a.parts.Log.WarnContext(ctx, "could not read which driver was active before", "err", err)
	}
	if s.staged, err = store.Sets(); err != nil {
		a.parts.Log.WarnContext(ctx, "could not read the staged drivers", "err", err)
	}
	if s.attempts, err = readAttempts(store); err != nil {
		a.parts.Log.WarnContext(ctx, "could not read the record of activations", "err", err)
		s.attempts = attempts{}
	}
	return s, nil
}

// waiting returns the driver that waits until no other driver is loaded (attempt.Next), or nil.
func (s nodeState) waiting() *install.Set {
	for _, set := range s.staged {
		if at := s.attempts[set.Digest]; at != nil && at.Next {
			return set
		}
	}
	return nil
}

// required are the modules that CUDA programs need.
var required = []string{"nvidia", "nvidia_uvm"}

// incomplete reports whether a module that CUDA programs need is not loaded.
func (s nodeState) incomplete() bool {
	for _, name := range required {
		if !slices.ContainsFunc(s.facts.Modules, func(m host.Module) bool { return m.Name == name }) {
			return true
		}
	}
	return false
}
