package gpucheck

import "time"

// hangTime is how long a check may take until the last verdict counts as unknown.
const hangTime = time.Minute

// CheckTimer measures how long the driver has not answered a check. The caller locks it.
type CheckTimer struct {
	since time.Time     // the start of the first check since the last answer; zero if no check waits for an answer
	took  time.Duration // the time of the last check that was answered
}

// Start notes the start of a check.
func (c *CheckTimer) Start(now time.Time) {
	if c.since.IsZero() {
		c.since = now
	}
}

// Answer notes a verdict.
func (c *CheckTimer) Answer(now time.Time) {
	if !c.since.IsZero() {
		c.since, c.took = time.Time{}, now.Sub(c.since)
	}
}

// Stop notes the end of a check that says nothing about the driver. It does not end a hang: only an answer does.
func (c *CheckTimer) Stop(now time.Time) {
	if c.HungSince(now).IsZero() {
		c.since = time.Time{}
	}
}

// HungSince returns the start of the check that hangs, or zero. A check hangs after hangTime. If the check before was
// slow, it hangs after twice the time of that check, at most after probeTime: a machine whose checks are always slow
// would otherwise change its state in each check.
func (c *CheckTimer) HungSince(now time.Time) time.Time {
	if c.since.IsZero() || now.Sub(c.since) <= max(hangTime, min(2*c.took, probeTime)) {
		return time.Time{}
	}
	return c.since
}
