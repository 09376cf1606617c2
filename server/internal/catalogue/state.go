package catalogue

import (
	"fmt"
	"slices"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// event is something that happens to a build. The tables below hold all rules about the order of a build's states. No
// other code has such rules.
type event string

const (
	start    event = "start"    // a builder starts an attempt
	progress event = "progress" // a builder is still at work, or reports a new fact
	publish  event = "publish"  // the artifact is in the registry
	fail     event = "fail"     // no builder tries again without a new request
	putBack  event = "put back" // the build waits for its next attempt
	cancel   event = "cancel"   // somebody cancelled the build
)

// leads has the state that each event leads to.
var leads = map[event]api.State{
	start: api.Building, publish: api.Published, fail: api.Failed, putBack: api.Queued, cancel: api.Cancelled,
}

// allowed has the states in which each event may happen. A failed build may start again, because the queue may still
// offer the job of a build that the server marked as failed. The event publish is allowed in every state, even after a
// cancel, because the artifact exists. Published is final.
var allowed = map[event][]api.State{
	start:   {api.Queued, api.Building, api.Failed},
	publish: {api.Queued, api.Building, api.Failed, api.Cancelled, api.Published},
	fail:    {api.Queued, api.Building, api.Failed},
	putBack: {api.Queued, api.Building, api.Failed},
	cancel:  {api.Queued, api.Building, api.Cancelled},
}

// tooLate has the states in which an event arrives too late and changes nothing. Such a report is not a mistake of the
// builder, so it is not an error. The answer has the build's state, so the builder stops.
var tooLate = map[event][]api.State{
	progress: {api.Queued, api.Published, api.Failed, api.Cancelled},
	fail:     {api.Cancelled},
	putBack:  {api.Cancelled},
}

// eventOf returns the event that an update reports.
func eventOf(u api.BuildUpdate) (event, error) {
	if u.State == "" {
		return progress, nil
	}
	for e, s := range leads {
		if s == u.State {
			return e, nil
		}
	}
	return "", fmt.Errorf("state %q is not a state of builds", u.State)
}

// apply changes a build by an event with the values of u. It returns an error if the event is not allowed.
func apply(b api.Build, e event, u api.BuildUpdate, at time.Time) (api.Build, error) {
	if u.Kernel != nil && (u.Kernel.BuildID != b.Kernel.BuildID || u.Kernel.Board != b.Kernel.Board) {
		return b, fault.New(fault.Mismatch, fmt.Sprintf("the build is for kernel %s, not %s", b.Kernel, *u.Kernel), "")
	}
	// A newer attempt has begun, because the queue assumed that the builder of this attempt had died.
	superseded := e != publish && u.Attempt > 0 && u.Attempt < b.Attempt
	switch {
	case slices.Contains(tooLate[e], b.State), superseded && (e == fail || e == putBack):
		return b, nil
	case e != progress && !slices.Contains(allowed[e], b.State):
		return b, fault.New(fault.Mismatch, fmt.Sprintf("the build is %s and cannot become %s", b.State, leads[e]), "")
	case superseded:
		return b, fault.New(fault.Mismatch,
			fmt.Sprintf("attempt %d of the build runs now, not attempt %d", b.Attempt, u.Attempt), "")
	case b.State == api.Published && u.Digest != b.Digest: // a repeated report has to name the same digest
		return b, fault.New(fault.Mismatch, "the build is published already, as artifact "+b.Digest, "")
	}
	if u.Kernel != nil {
		b.Kernel = *u.Kernel
	}
	moved := b.State != leads[e]
	switch e {
	case start:
		// After a worker was killed, the next attempt finds the build in state building.
		if moved || u.Attempt > b.Attempt {
			b.StartedAt, b.FinishedAt, b.Phase = &at, nil, ""
			b.Class, b.Error, b.Hint, b.Phases = "", "", "", nil
		}
		b.HeartbeatAt = &at
	case progress:
		b.HeartbeatAt = &at
	case publish:
		b.Class, b.Error, b.Hint, b.Digest = "", "", "", u.Digest
	case fail, putBack: // a queued build keeps the error of its last attempt
		set(&b.Class, u.Class)
		set(&b.Error, u.Error)
		set(&b.Hint, u.Hint)
	}
	if e == putBack && moved {
		b.Phase, b.Worker, b.StartedAt, b.FinishedAt, b.HeartbeatAt = "", "", nil, nil, nil
	}
	if moved && (e == publish || e == fail || e == cancel) {
		b.FinishedAt, b.HeartbeatAt = &at, nil
	}
	if e != progress {
		b.State = leads[e]
	}
	set(&b.Phase, u.Phase)
	set(&b.Worker, u.Worker)
	if u.Attempt > 0 {
		b.Attempt = u.Attempt
	}
	if u.Phases != nil {
		b.Phases = u.Phases
	}
	return b, nil
}

// set stores a value unless it is empty.
func set(field *string, value string) {
	if value != "" {
		*field = value
	}
}

// open reports whether a build is queued or building.
func open(b *api.Build) bool {
	return b != nil && (b.State == api.Queued || b.State == api.Building)
}
