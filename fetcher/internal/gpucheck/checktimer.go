package gpucheck

import "time"

// hangTime is how long a check may take until the last verdict counts as unknown.
const hangTime = time.Minute

// CheckTimer measures how long the driver has not answered a check. The caller must serialise the calls.
type CheckTimer struct {
	since time.Time // the start of the first check since the last answer; zero if no check waits for an answer
	// took is the duration of the last check that was answered, or 7/8 of the value before, whichever is longer, but at
	// most probeTime. A machine may answer slowly only while no program uses its GPUs.
	took time.Duration
}

// Start notes the start of a check.
func (c *CheckTimer) Start(now time.Time) {
	if c.since.IsZero() {
		c.since = now
	}
}

// Answer notes that the driver answered the check, so that there is a verdict.
func (c *CheckTimer) Answer(now time.Time) {
	if !c.since.IsZero() {
		c.since, c.took = time.Time{}, min(max(now.Sub(c.since), c.took/8*7), probeTime)
	}
}

// Stop notes the end of a check that says nothing about the driver. It does not end a hang: only an answer does.
func (c *CheckTimer) Stop(now time.Time) {
	if c.HungSince(now).IsZero() {
		c.since = time.Time{}
	}
}

// HungSince returns the start of the check that hangs, or zero. A check hangs after hangTime. If earlier checks were
// slow, a check hangs only after twice CheckTimer.took, but at the latest after probeTime. Otherwise a machine with
// slow checks would change its state in each of them.
func (c *CheckTimer) HungSince(now time.Time) time.Time {
	if c.since.IsZero() || now.Sub(c.since) <= max(hangTime, min(2*c.took, probeTime)) {
		return time.Time{}
	}
	return c.since
}
