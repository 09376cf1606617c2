package batch

import (
	"fmt"
	"slices"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/timeline"
)

// State is what happened to a cell.
type State string

// The states. The empty one is open: missing, and not begun.
const (
	Published   State = "published"   // made now
	Existed     State = "existed"     // was there already
	Failed      State = "failed"      // Failure says how
	Unavailable State = "unavailable" // does not exist in this flavour, or not for this kernel
	Cancelled   State = "cancelled"   // told to stop
	Missing     State = "missing"     // of a plan that was only looked at
)

// States returns all states in the order of a summary.
func States() []State {
	return []State{Published, Existed, Missing, Unavailable, Failed, Cancelled}
}

// Job is a cell and what happened to it.
type Job struct {
	// Index is the cell's place in the plan.
	Index int       `json:"-"`
	Cell  plan.Cell `json:"cell"`
	State State     `json:"state"`
	// Digest names the artifact of a published cell.
	Digest   string   `json:"digest,omitempty"`
	Attempts int      `json:"attempts,omitempty"`
	Seconds  float64  `json:"seconds"`
	Failure  *Failure `json:"failure,omitempty"`
	// Known says that the failure was met in an earlier run, from the same inputs.
	Known bool `json:"known,omitempty"`
	// Like names the kernel of the same fingerprint that failed this way.
	Like   string           `json:"like,omitempty"`
	Log    string           `json:"log,omitempty"`
	Phases []timeline.Phase `json:"phases,omitempty"`
}

// EventKind says what happened.
type EventKind int

// What happens to a cell.
const (
	Started EventKind = iota
	Phase
	Again   // an attempt failed, another one comes
	Settled // it has a state
	Note    // something that is no failure
	Fetch   // an input of this cell and others is on its way
)

// Event is something that happened to a cell. The Job is a copy.
type Event struct {
	Job         *Job
	Kind        EventKind
	Phase       timeline.Event // of Phase
	Failure     *Failure       // of Again and Note
	Text        string         // of Fetch
	Done, Total int            // cells
}

// Count is how many cells failed in one way.
type Count struct {
	Class        fault.Kind `json:"class"`
	EarlyWarning bool       `json:"earlyWarning"`
	Cells        int        `json:"cells"`
}

// Report is what a run came to.
type Report struct {
	Jobs []*Job `json:"cells"`
	// States counts cells, and Failures those that failed, by class.
	States   map[State]int `json:"states"`
	Failures []Count       `json:"failures,omitempty"`
	Notes    []string      `json:"notes,omitempty"`
}

func (f *runner) report(p *plan.Plan) *Report {
	r := &Report{States: map[State]int{}, Notes: p.Notes}
	for _, j := range f.jobs {
		if j.State == "" {
			j.State = Missing
		}
		if j.Attempts == 0 {
			j.Log = "" // of an earlier run, if there is one
		}
		r.Jobs = append(r.Jobs, j.Job)
		r.States[j.State]++
		if j.State != Failed {
			continue
		}
		i := slices.IndexFunc(r.Failures, func(c Count) bool {
			return c.Class == j.Failure.Class && c.EarlyWarning == j.Cell.EarlyWarning
		})
		if i < 0 {
			i = len(r.Failures)
			r.Failures = append(r.Failures, Count{Class: j.Failure.Class, EarlyWarning: j.Cell.EarlyWarning})
		}
		r.Failures[i].Cells++
	}
	slices.SortStableFunc(r.Failures, func(a, b Count) int { return a.Class.ExitCode() - b.Class.ExitCode() })
	return r
}

// several is the class of cells that failed in more than one way.
const several = fault.Several

// Err is nil when everything that alarms is published. Otherwise its kind is
// that of the failures, where all are of one kind; a run that was told to stop
// is cancelled, whatever failed before.
func (r *Report) Err() error {
	failed, kinds := 0, []fault.Kind{}
	for _, c := range r.Failures {
		if c.EarlyWarning {
			continue
		}
		failed += c.Cells
		if !slices.Contains(kinds, c.Class) {
			kinds = append(kinds, c.Class)
		}
	}
	stopped := r.States[Cancelled]
	const hint = "read the reason of each cell in the table; --output json names its log"
	switch {
	case stopped > 0:
		return fault.New(fault.Cancelled,
			fmt.Sprintf("stopped: %d of %d cells were not built, %d failed", stopped, len(r.Jobs), failed),
			"run the command again: it keeps what is done")
	case failed == 0:
		return nil
	case len(kinds) == 1:
		return fault.New(kinds[0], fmt.Sprintf("%d of %d cells failed: %v", failed, len(r.Jobs), kinds[0]), hint)
	}
	text := ""
	for i, k := range kinds {
		if i > 0 {
			text += ", "
		}
		text += k.String()
	}
	return fault.Wrap(several, fmt.Errorf("%d of %d cells failed in several ways: %s", failed, len(r.Jobs), text), hint)
}

// Early counts the failures of early warnings.
func (r *Report) Early() (n int) {
	for _, c := range r.Failures {
		if c.EarlyWarning {
			n += c.Cells
		}
	}
	return n
}
