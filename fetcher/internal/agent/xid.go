package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/kmod"
)

// A fatal error of a GPU no longer counts if NVML says that the GPU needs a reset, and then lists the GPU as healthy in
// answersAgain checks in a row.
const answersAgain = 5

// xidWatch has the fatal GPU errors in the kernel log since this program loaded the driver, or first checked it.
type xidWatch struct {
	// load is the log's position at that time, and before has the errors that counted there. mark is the position up to
	// which the log was read.
	load, mark kmod.Mark
	before     []string
	lines      []string // the errors that count now, at most one of each GPU
	// good has the number of healthy answers in a row, by the GPU of an error. A GPU is missing until NVML has said, since
	// its last error, that it needs a reset.
	good map[string]int
	note string // says which errors no longer count
}

// newXids reads the new lines of the kernel log and returns the lines with fatal errors that still count. A new process
// continues from the position that an earlier process stored in this boot.
func (a *Agent) newXids() []string {
	if a.xids.mark == (kmod.Mark{}) {
		if rec := a.readRecord(); rec != nil {
			a.xids = xidWatch{load: rec.Log, mark: rec.Log, before: rec.Xids, lines: slices.Clone(rec.Xids)}
		}
	}
	lines, end := a.loader.Follow(a.xids.mark)
	a.xids.mark = end
	if a.xids.load == (kmod.Mark{}) {
		a.xids.load = end
	}
	for _, line := range gpucheck.KeepXids(lines) { // a new error: whatever was seen before it proves nothing
		delete(a.xids.good, gpucheck.XidGPU(line))
		a.xids.note = ""
	}
	a.xids.lines = gpucheck.KeepXids(append(a.xids.lines, lines...))
	return a.xids.lines
}

// clearXids clears the errors of GPUs that were reset, as NVML's answers show. The driver does not log each reset. A
// GPU that never needed a reset by NVML's answers keeps its error. Healthy answers alone prove nothing: many fatal
// errors leave them as they are. Healthy answers after failed ones prove nothing either: the GPU's firmware may be too
// slow for one call and answer the next (Xid 119), and NVIDIA demands a reset then, too.
func (a *Agent) clearXids(ctx context.Context, store *install.Store, nvml gpucheck.NVML) {
	if nvml.Version == "" || nvml.Error != "" { // NVML as a whole does not answer, which says nothing about a GPU
		return
	}
	var rest, cleared []string
	for _, line := range a.xids.lines {
		gpu := gpucheck.XidGPU(line)
		n, broken := a.xids.good[gpu]
		switch {
		case nvml.NeedsReset(gpu):
			if a.xids.good == nil {
				a.xids.good = map[string]int{}
			}
			n, a.xids.good[gpu] = 0, 0
		case broken && nvml.Answers(gpu):
			n++
			a.xids.good[gpu] = n
		case broken:
			n, a.xids.good[gpu] = 0, 0
		}
		if broken && n >= answersAgain {
			cleared = append(cleared, line)
		} else {
			rest = append(rest, line)
		}
	}
	if len(cleared) == 0 {
		return
	}
	if err := a.storeXids(store, rest); err != nil { // the next check tries again
		a.parts.Log.WarnContext(ctx, "could not clear the error of a GPU that works again", "err", err)
		return
	}
	for _, line := range cleared {
		delete(a.xids.good, gpucheck.XidGPU(line))
	}
	a.xids.load, a.xids.before, a.xids.lines = a.xids.mark, rest, slices.Clone(rest)
	a.xids.note = fmt.Sprintf("NVML said that the GPU needs a reset, and then listed it as healthy in %d checks, so "+
		"this no longer counts: %s",
		answersAgain, strings.Join(gpucheck.FatalXids(cleared), "; "))
	a.parts.Log.InfoContext(ctx, "cleared the error of a GPU that works again", "reason", a.xids.note)
}

// storeXids stores the errors that still count at the present position in the log, for the next process.
func (a *Agent) storeXids(store *install.Store, lines []string) (err error) {
	unlock, err := store.Lock(googleLock) // a run of another process writes the same file
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	rec := a.readRecord()
	if rec == nil { // the next process then starts at the end of the log
		return nil
	}
	rec.Log, rec.Xids = a.xids.mark, lines
	return writeRecord(store, *rec)
}
