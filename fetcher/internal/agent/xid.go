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

// xidWatch has the fatal GPU errors in the kernel log since the load of the driver, or since its first check in this
// boot.
type xidWatch struct {
	// begun is true after the load by this process, or after the first read of the log.
	begun bool
	// mark is the position up to which the log was read. lines has the errors that count there, at most one of each GPU.
	mark  kmod.Mark
	lines []string
	// good has the number of checks in a row in which NVML listed the GPU as healthy, by the GPU of an error. A GPU has an
	// entry only if NVML has reported, since its last error, that it needs a reset.
	good map[string]int
	note string // a text about the errors that no longer count
	// unsaved means that the record on the disk lacks an error.
	unsaved bool
}

// xidRecord is the part of a record from which the next process of the same boot continues.
type xidRecord struct {
	// Log is a position in the kernel log. Xids are the fatal GPU errors that count there.
	Log  kmod.Mark `json:"kernelLog,omitzero"`
	Xids []string  `json:"xids,omitempty"`
	// NeedReset has those GPUs of these errors for which NVML has reported, after the error, that they need a reset.
	NeedReset []string `json:"needReset,omitempty"`
	// Fatal has the numbers of the errors that count as fatal for the program that wrote this. That program may have read
	// lines after Log, too.
	Fatal []int `json:"fatalXids,omitempty"`
}

// newXids reads the new lines of the kernel log and returns the lines with fatal errors that still count. A new process
// continues from the record of an earlier process of this boot. If the earlier process may have read a line, its error
// counts only if it is fatal for both programs.
func (a *Agent) newXids() []string {
	x := &a.xids
	keep := gpucheck.KeepXids
	if !x.begun {
		x.begun = true
		if rec := a.readRecord(); rec != nil {
			x.mark, x.lines = rec.Log, rec.Xids
			x.good = map[string]int{}
			for _, gpu := range rec.NeedReset {
				x.good[gpu] = 0
			}
			keep = func(lines []string) []string { return gpucheck.KeepJudgedXids(lines, rec.Fatal) }
		}
	}
	lines, end := a.loader.Follow(x.mark)
	x.mark = end
	for _, line := range keep(lines) { // a new error: whatever was seen before it proves nothing
		delete(x.good, gpucheck.XidGPU(line))
		x.note, x.unsaved = "", true
	}
	x.lines = keep(slices.Concat(x.lines, lines))
	return x.lines
}

// xidsSince returns the lines with the fatal errors that count: from a record, and from the kernel log since that
// record.
func (a *Agent) xidsSince(rec xidRecord) []string {
	lines, _ := a.loader.Follow(rec.Log)
	return gpucheck.KeepJudgedXids(slices.Concat(rec.Xids, lines), rec.Fatal)
}

// compare updates good by one answer of NVML.
func (x *xidWatch) compare(nvml gpucheck.NVML) {
	if nvml.Version == "" || nvml.Error != "" { // NVML as a whole does not answer, which says nothing about a GPU
		return
	}
	for _, line := range x.lines {
		gpu := gpucheck.XidGPU(line)
		n, broken := x.good[gpu]
		switch {
		case nvml.NeedsReset(gpu):
			if x.good == nil {
				x.good = map[string]int{}
			}
			x.good[gpu] = 0
		case broken && nvml.Answers(gpu):
			x.good[gpu] = n + 1
		case broken:
			x.good[gpu] = 0
		}
	}
}

// record returns what the next process needs. lines are the errors that count.
func (x *xidWatch) record(lines []string) xidRecord {
	rec := xidRecord{Log: x.mark, Xids: slices.Clone(lines), Fatal: gpucheck.FatalNumbers()}
	for _, line := range lines {
		if _, broken := x.good[gpucheck.XidGPU(line)]; broken {
			rec.NeedReset = append(rec.NeedReset, gpucheck.XidGPU(line))
		}
	}
	return rec
}

// saveCheck stores the result of a check for the next process. It also clears the errors of a GPU if NVML first
// reported that the GPU needs a reset, and then listed it as healthy often enough (answersAgain): the driver does not
// log each reset. If NVML never reported that need, the errors stay. Healthy answers alone prove nothing, because after
// many fatal errors NVML still lists the GPU as healthy. Nor do healthy answers after failed ones: the GPU's firmware
// may be too slow for one call and answer the next (Xid 119), and NVIDIA demands a reset then, too.
func (a *Agent) saveCheck(ctx context.Context, store *install.Store, v gpucheck.Verdict) {
	x := &a.xids
	var rest, cleared []string
	for _, line := range x.lines {
		if n, broken := x.good[gpucheck.XidGPU(line)]; broken && n >= answersAgain {
			cleared = append(cleared, line)
		} else {
			rest = append(rest, line)
		}
	}
	if err := a.storeCheck(store, x.record(rest), v); err != nil { // the next check tries again
		a.parts.Log.WarnContext(ctx, "could not record the check of the driver", "err", err)
		return
	}
	if x.unsaved = false; len(cleared) == 0 {
		return
	}
	for _, line := range cleared {
		delete(x.good, gpucheck.XidGPU(line))
	}
	x.lines = rest
	x.note = fmt.Sprintf("NVML said that the GPU needs a reset, and then listed it as healthy in %d checks, so "+
		"this no longer counts: %s",
		answersAgain, strings.Join(gpucheck.FatalXids(cleared), "; "))
	a.parts.Log.InfoContext(ctx, "cleared the error of a GPU that works again", "reason", x.note)
}

// storeCheck writes the errors and the verdict of a check to the record, if they changed: the kernel log drops old
// lines, and the GPUs may have changed since the last run.
func (a *Agent) storeCheck(store *install.Store, xids xidRecord, v gpucheck.Verdict) (err error) {
	rec := a.readRecord()
	if rec == nil || !a.xids.unsaved && !rec.differs(v) && slices.Equal(rec.Xids, xids.Xids) &&
		slices.Equal(rec.NeedReset, xids.NeedReset) {
		return nil // without a record, the next process starts at the end of the log
	}
	if a.holds != nil { // this run downloads a driver
		store = a.holds
	} else {
		var unlock func() error
		if unlock, err = store.Lock(googleLock); err != nil { // a run of another process writes the same file
			return err
		}
		defer func() { err = errors.Join(err, unlock()) }()
	}
	if rec = a.readRecord(); rec == nil {
		return nil
	}
	if rec.xidRecord = xids; rec.differs(v) {
		rec.MostUsableGPUs = rec.mostUsable()
		rec.Verdict, rec.At = v, a.parts.Now().UTC()
	}
	return writeRecord(store, *rec)
}

// differs reports whether NVML's answer in a verdict on the same driver changed its state, its reason or the number of
// usable GPUs. The reason names the GPUs that are not usable. Without an answer, a verdict says nothing about what the
// driver can do.
func (rec *record) differs(v gpucheck.Verdict) bool {
	return v.NVML.Version != "" && v.NVML.Error == "" && v.Digest == rec.Verdict.Digest &&
		(v.State != rec.Verdict.State || v.UsableGPUs != rec.Verdict.UsableGPUs || v.Reason != rec.Verdict.Reason)
}
