package catalogue

import (
	"fmt"
	"slices"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// event is something that happens to a build. Only the tables below have rules about the order of states.
type event string

const (
	start    event = "start"    // a builder starts an attempt
	progress event = "progress" // a builder is still at work, or reports a new fact
	publish  event = "publish"  // the artifact is in the registry
	fail     event = "fail"     // the build failed, and no builder tries again without a new request
	putBack  event = "put back" // the build waits for its next attempt
	cancel   event = "cancel"   // somebody cancelled the build
)

// stateAfter has the state that each event leads to.
var stateAfter = map[event]api.State{
	start: api.Building, publish: api.Published, fail: api.Failed, putBack: api.Queued, cancel: api.Cancelled,
}

// allowedStates are the states in which an event may happen. A failed build may start again, because its job may still
// be in the queue. Publishing is always allowed, even after a cancel, because the artifact exists.
var allowedStates = map[event][]api.State{
	start:   {api.Queued, api.Building, api.Failed},
	publish: {api.Queued, api.Building, api.Failed, api.Cancelled, api.Published},
	fail:    {api.Queued, api.Building, api.Failed},
	putBack: {api.Queued, api.Building, api.Failed},
	cancel:  {api.Queued, api.Building, api.Cancelled},
}

// tooLateStates are the states in which an event changes nothing and is no error, because the builder could not know
// the state. The state in the response makes the builder stop.
var tooLateStates = map[event][]api.State{
	progress: {api.Queued, api.Published, api.Failed, api.Cancelled},
	fail:     {api.Cancelled},
	putBack:  {api.Cancelled},
}

// eventOf returns the event that an update reports.
func eventOf(u api.BuildUpdate) (event, error) {
	if u.State == "" {
		return progress, nil
	}
	for e, s := range stateAfter {
		if s == u.State {
			return e, nil
		}
	}
	return "", fmt.Errorf("state %q is not a state of builds", u.State)
}

// superseded reports whether a later attempt than the update's has begun, because the builder of the update seemed
// dead.
func superseded(b api.Build, e event, u api.BuildUpdate) bool {
	return e != publish && u.Attempt > 0 && u.Attempt < b.Attempt
}

// tooLate reports whether an update comes too late: it then changes nothing, and is no error.
func tooLate(b api.Build, e event, u api.BuildUpdate) bool {
	return slices.Contains(tooLateStates[e], b.State) || superseded(b, e, u) && (e == fail || e == putBack)
}

// apply returns the build after an event, with the values of the update. If the event is not allowed, it returns an
// error.
func apply(b api.Build, e event, u api.BuildUpdate, at time.Time) (api.Build, error) {
	if u.Kernel != nil && (u.Kernel.BuildID != b.Kernel.BuildID || u.Kernel.Board != b.Kernel.Board) {
		return b, fault.New(fault.Mismatch, fmt.Sprintf("the build is for kernel %s, not %s", b.Kernel, *u.Kernel), "")
	}
	switch {
	case tooLate(b, e, u):
		return b, nil
	case e != progress && !slices.Contains(allowedStates[e], b.State):
		return b, fault.New(fault.Mismatch,
			fmt.Sprintf("the build is %s and cannot become %s", b.State, stateAfter[e]), "")
	case superseded(b, e, u):
		return b, fault.New(fault.Mismatch,
			fmt.Sprintf("attempt %d of the build runs now, not attempt %d", b.Attempt, u.Attempt), "")
	case b.State == api.Published && u.Digest != b.Digest: // a repeated report must have the same digest
		return b, fault.New(fault.Mismatch, "the build is published already, as artifact "+b.Digest, "")
	}
	if u.Kernel != nil {
		b.Kernel = *u.Kernel
	}
	moved := b.State != stateAfter[e]
	switch e {
	case start:
		// If a builder was killed, the build is still in state building when the next attempt begins.
		if moved || u.Attempt > b.Attempt {
			b.StartedAt, b.FinishedAt, b.Phase = &at, nil, ""
			b.Class, b.Error, b.Hint, b.Phases, b.LogRemovedAt = "", "", "", nil, nil
		}
		b.HeartbeatAt = &at
	case progress:
		b.HeartbeatAt = &at
	case publish:
		b.Class, b.Error, b.Hint, b.Digest = "", "", "", u.Digest
	case fail, putBack: // a build that is put back keeps the error of its last attempt
		setNonEmpty(&b.Class, u.Class)
		setNonEmpty(&b.Error, u.Error)
		setNonEmpty(&b.Hint, u.Hint)
	}
	if e == putBack && moved {
		b.Phase, b.Worker, b.StartedAt, b.FinishedAt, b.HeartbeatAt = "", "", nil, nil, nil
	}
	if moved && (e == publish || e == fail || e == cancel) {
		b.FinishedAt, b.HeartbeatAt = &at, nil
	}
	if e != progress {
		b.State = stateAfter[e]
	}
	setNonEmpty(&b.Phase, u.Phase)
	setNonEmpty(&b.Worker, u.Worker)
	if u.Attempt > 0 {
		b.Attempt = u.Attempt
	}
	if u.Phases != nil {
		b.Phases = u.Phases
	}
	return b, nil
}

// setNonEmpty sets a field, unless the value is empty.
func setNonEmpty(field *string, value string) {
	if value != "" {
		*field = value
	}
}

// isOpen reports whether a build is queued or building.
func isOpen(b *api.Build) bool {
	return b != nil && (b.State == api.Queued || b.State == api.Building)
}
