package agent

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// revertPlan has what an activation has changed, and what revert must restore.
type revertPlan struct {
	set, before *install.Set
	to          install.Pointers
	changed     bool
	foreign     *foreignFiles // the foreign driver that was unloaded
	blame       bool          // whether the failure counts against the driver
}

// revert restores files and modules after a failed activation. If the failed driver cannot be unloaded, it stays
// active. A failure to use GPUs counts against the driver only if another driver can use more of them (see suspect).
// The returned error includes the given cause.
func (a *Agent) revert(ctx context.Context, r *Report, store *install.Store, s nodeState, t revertPlan,
	cause error) error {
	before := t.before
	if fault.Is(cause, fault.NoDevice) {
		// The driver found no device, although a GPU is on the PCI bus.
		cause = fault.Wrap(fault.Unusable, fmt.Errorf("GPU present but not usable: %w", cause),
			"check that this driver supports the GPU; if not, set another version or flavour: --driver, --flavour")
	}
	// Unless the owner permits it, the agent must not unload modules that another program loaded (see nodeState.put).
	may := len(s.facts.Modules) == 0 || s.ownLoaded() || s.replaceForeign
	reload := may && s.returnTo(before) && (t.changed || s.facts.Runs(before.Driver))
	var errs []error
	if reload {
		if err := a.unloadOf(ctx, r, t.set, before); err != nil {
			return fmt.Errorf("%w; the rollback then had errors: %w", cause,
				errors.Join(fmt.Errorf("roll back from driver %s, which stays active: %w", t.set.Driver, err),
					a.end(store, t.set.Digest, cause, t.blame)))
		}
	}
	if t.changed {
		if err := restore(store, t.to, before); err != nil {
			errs = append(errs, fmt.Errorf("roll back installed files: %w", err))
		} else {
			r.Changed = false
			r.did("rolled the install back")
		}
	}
	errs = append(errs, a.restoreFirmwarePath(s.facts))
	r.Verdict = gpucheck.Verdict{}
	could, probed := unknown, false // the number of GPUs that the former driver can use, and whether the probe was asked
	if !t.foreign.stillRuns(a) {
		if err := t.foreign.reload(ctx, a, r); err != nil {
			errs = append(errs, err)
			could = usableAfter(err)
		} else {
			reload, could = false, math.MaxInt
		}
	}
	if reload {
		proved, err := a.verifySet(ctx, store, before, s.facts)
		if reload = err == nil; reload {
			before = proved
		} else {
			errs = append(errs, err)
		}
	}
	if reload {
		mark, params := a.loader.Mark(), a.paramsBefore(before.Driver)
		if _, err := a.loader.Load(ctx, a.images(store, before, s.facts, params, true)); err != nil {
			errs = append(errs, fmt.Errorf("load driver %s again: %w", before.Driver, err))
			could = usableAfter(err)
		} else {
			r.did("loaded %s again", before.Driver)
			errs = append(errs, a.makeNodes())
			a.xids, a.cuda.due = xidWatch{begun: true, mark: mark}, true
			probed = true
			if v, err := a.validate(ctx, before, mark, a.newXids()); err != nil {
				errs = append(errs, err)
			} else {
				if r.Verdict = v; !v.OnlyReset { // else the failed driver may be the reason why the GPU needs a reset
					could = v.UsableGPUs
				}
				errs = append(errs, a.countSuspects(store, v), a.remember(r, store, v, params))
			}
		}
	}
	a.describeGPUs(ctx, r.Verdict)
	count, report := t.blame, t.blame
	if n := usableAfter(cause); n != unknown && count {
		switch {
		case could > n: // another driver can use more GPUs
		case could != unknown:
			count, report = false, false
			cause = fmt.Errorf("%w; this does not count against driver %s, because the former driver cannot use more GPUs",
				cause, t.set.Driver)
		case !probed: // no other driver was loaded now
			count = false
			a.suspects = append(a.suspects, suspect{t.set.Digest, n, cause})
		}
	}
	errs = append(errs, a.end(store, t.set.Digest, cause, count))
	if report {
		a.addHistory(ctx, store, eventReverted, t.set, string(r.Verdict.State), cause)
	}
	if lost := errors.Join(errs...); lost != nil {
		return fmt.Errorf("%w; the rollback then had errors: %w", cause, lost)
	}
	return cause
}

// suspect is a driver that this run could not use, with no other driver to compare it with. Such a failure counts only
// if another driver then can use more GPUs. Otherwise a GPU that no driver can use would condemn a good driver.
type suspect struct {
	digest string
	usable int // GPUs
	err    error
}

// countSuspects counts the failures of the suspects that could use fewer GPUs than the driver of this verdict.
func (a *Agent) countSuspects(store *install.Store, v gpucheck.Verdict) (err error) {
	for _, s := range a.suspects {
		if s.digest != v.Digest && v.UsableGPUs > s.usable {
			err = errors.Join(err, a.note(store, s.digest, func(at *attempt) { at.failed(s.err) }))
		}
	}
	a.suspects = nil
	return err
}

// unknown is the result of usableAfter for an error that says nothing about GPUs.
const unknown = -1

// usableAfter returns how many GPUs a driver can use whose activation ended with this error. For an error that says
// nothing about GPUs, such as a probe that does not answer, it returns unknown. revert then compares no GPUs, and the
// failure counts: otherwise the node would unload its driver for each further attempt.
func usableAfter(err error) int {
	var p *gpucheck.Problem
	switch {
	case errors.As(err, &p):
		return p.Verdict.UsableGPUs
	case errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EIO):
		return 0
	}
	return unknown
}

// paramsBefore returns the module parameters with which the former driver d was loaded in this boot. If the last record
// is about another driver, a run was killed after it loaded d, with the present parameters. The digests may differ: of
// two artifacts with the same modules, the second becomes active without a load.
func (a *Agent) paramsBefore(d target.Driver) map[string]string {
	if rec := a.readRecord(); rec != nil && rec.Verdict.Driver.Modules() == d.Modules() {
		return rec.Params
	}
	return a.cfg.ModuleParams
}

// stillRuns reports whether all modules of f are loaded.
func (f *foreignFiles) stillRuns(a *Agent) bool {
	now, err := host.LoadedModules(a.node)
	if err != nil {
		return true // assume that all are loaded
	}
	for _, m := range f.modules {
		if !slices.ContainsFunc(now,
			func(have host.Module) bool { return have.Name == m.Name && have.BuildID == m.BuildID }) {
			return false
		}
	}
	return true
}

// unloadOf unloads a driver whose activation failed, unless it is also the former driver.
func (a *Agent) unloadOf(ctx context.Context, r *Report, set, before *install.Set) error {
	facts, err := host.Observe(a.node)
	if err != nil || len(facts.Modules) == 0 || before.Digest == set.Digest || !(nodeState{facts: facts}).runs(set) {
		return err
	}
	if err := idle(facts); err != nil {
		return err
	}
	return a.unload(ctx, r, facts)
}

// rollbackLater notes a rollback for the time when the loaded driver is no longer in use. It returns the given error
// with a note on that.
func (a *Agent) rollbackLater(r *Report, store *install.Store, current, previous *install.Set, busy error) error {
	if err := a.noteNext(store, previous.Digest, current.Digest); err != nil {
		return errors.Join(busy, fmt.Errorf("record that a rollback is wanted: %w", err))
	}
	r.Pending = fmt.Sprintf("driver %s (%s) waits until no driver is loaded, or until the GPU is idle", previous.Driver,
		short(previous.Digest))
	pin := ""
	if a.pin() != "" {
		pin = current.Digest
	}
	err := fmt.Errorf("%w; fetcher recorded the rollback to driver %s for later", busy, previous.Driver)
	return fault.Wrap(fault.Busy, err,
		"reboot the node, or stop the programs that use the GPU (\"fetcher status\" lists their processes); "+
			"the previous driver is then loaded by \"fetcher run\", if it watches this node, or by the next "+
			"\"fetcher install\"; to keep the present driver, "+retryCommand(current.Driver, pin))
}
