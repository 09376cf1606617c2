package batch

import (
	"fmt"
	"slices"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/timeline"
)

// State is the outcome for one cell.
type State string

// The states. An empty State means that the cell is open: it has no outcome yet.
const (
	Published   State = "published"   // this run made and published the cell
	Existed     State = "existed"     // the cell was published before
	Failed      State = "failed"      // the cell failed; Failure has the reason
	Unavailable State = "unavailable" // the release lacks this flavour, or COS lists no such driver for this kernel
	Cancelled   State = "cancelled"   // the run was stopped before the cell had an outcome
	Missing     State = "missing"     // the cell is not published; only Status uses this state
)

// States returns all states in the order of the summary.
func States() []State {
	return []State{Published, Existed, Missing, Unavailable, Failed, Cancelled}
}

// Job is a cell and its outcome.
type Job struct {
	// Index is the cell's place in the plan.
	Index int       `json:"-"`
	Cell  plan.Cell `json:"cell"`
	State State     `json:"state"`
	// Digest is the manifest digest of the artifact, if the cell is published.
	Digest   string   `json:"digest,omitempty"`
	Attempts int      `json:"attempts,omitempty"`
	Seconds  float64  `json:"seconds"`
	Failure  *Failure `json:"failure,omitempty"`
	// Known is true if the failure is from an earlier run with the same inputs.
	Known bool `json:"known,omitempty"`
	// Like is set if this cell failed without an attempt, because another cell of the same build had failed. It is the
	// kernel of that other cell.
	Like   string           `json:"like,omitempty"`
	Log    string           `json:"log,omitempty"`
	Phases []timeline.Phase `json:"phases,omitempty"`
}

// EventKind is the kind of an Event.
type EventKind int

// The kinds of events.
const (
	Started EventKind = iota
	Phase             // a phase of the cell began or ended
	Again             // an attempt failed, and another one follows
	Settled           // the cell has its final state
	Note              // a problem that does not fail the cell
	Fetch             // progress with fetching an input of this cell
)

// Event reports progress of one cell. Job is a copy of the cell's state at that time.
type Event struct {
	Job         *Job
	Kind        EventKind
	Phase       timeline.Event // only for Phase
	Failure     *Failure       // only for Again and Note
	Text        string         // only for Fetch
	Done, Total int            // the number of cells that have a state, and the number of all cells
}

// Count is the number of failed cells of one class.
type Count struct {
	Class        fault.Kind `json:"class"`
	EarlyWarning bool       `json:"earlyWarning"`
	Cells        int        `json:"cells"`
}

// Report is the result of a run.
type Report struct {
	Jobs []*Job `json:"cells"`
	// States has the number of cells in each state. Failures has the number of failed cells by class.
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
			j.Log = "" // a log file of this name is from an earlier run
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

// Err returns nil if no cell failed; early warnings do not count. If all failures have one class, the error has this
// class as its kind. Otherwise the kind is fault.Several. If the run was stopped, the kind is always fault.Cancelled.
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
	const hint = "read in the table why each cell failed; to see the path of each log, run the command with --output json"
	switch {
	case stopped > 0:
		return fault.New(fault.Cancelled,
			fmt.Sprintf("stopped: %d of %d cells were not built, %d failed", stopped, len(r.Jobs), failed),
			"run the command again: the command does not build finished cells again")
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
	return fault.Wrap(fault.Several,
		fmt.Errorf("%d of %d cells failed in several ways: %s", failed, len(r.Jobs), text), hint)
}

// Early returns the number of failed early warnings.
func (r *Report) Early() (n int) {
	for _, c := range r.Failures {
		if c.EarlyWarning {
			n += c.Cells
		}
	}
	return n
}
