package agent

import (
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/kmod"
)

// xidWatch has the fatal GPU errors in the kernel log since this program loaded the driver, or first checked it. Its
// field load is the log's position at that time, and mark is the position up to which the log was read.
type xidWatch struct {
	load, mark kmod.Mark
	lines      []string
}

// newXids reads the new lines of the kernel log and returns the lines with fatal errors that still count. A new process
// continues from the position that an earlier process stored in this boot.
func (a *Agent) newXids() []string {
	if a.xids.mark == (kmod.Mark{}) {
		if rec := a.readRecord(); rec != nil {
			a.xids = xidWatch{load: rec.Log, mark: rec.Log}
		}
	}
	lines, end := a.loader.Follow(a.xids.mark)
	a.xids.mark = end
	if a.xids.load == (kmod.Mark{}) {
		a.xids.load = end
	}
	a.xids.lines = gpucheck.KeepXids(append(a.xids.lines, lines...))
	return a.xids.lines
}
