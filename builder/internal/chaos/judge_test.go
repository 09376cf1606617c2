package chaos_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// verdict is what the test found out about a run.
type verdict struct {
	jobs, published, failed int
	// doubled has the cells that were published more than once. lost has the cells that are neither published nor failed
	// with a reason. left is the number of jobs in the queue at the end.
	doubled, lost []string
	left          int
	reasons       map[string]int // number of failures by class
	// interrupted is the number of attempts that ran in a process when a fault hit it. resume is the longest time from a
	// fault until the cell continued or finished. slowest names the cell and the fault with this longest time.
	interrupted int
	resume      time.Duration
	slowest     string
	attempts    int
	took        time.Duration
}

// judge examines the catalogue, the registry, the server's log and the builders' notes.
func (s *faultRun) judge(t *testing.T) *verdict {
	t.Helper()
	v := &verdict{jobs: s.jobs, reasons: map[string]int{}, left: s.leftInQueue(t)}
	all, err := s.client.Builds(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	cells := map[string][]api.Build{}
	for _, b := range all {
		cells[b.Kernel.BuildID] = append(cells[b.Kernel.BuildID], b)
	}
	announced := s.countAnnounced(t)
	for n := range s.jobs {
		name := cell(n)
		times := 0
		for _, b := range cells[name] {
			if b.State == api.Published {
				times++
			}
			if announced[b.ID] > 1 {
				times += announced[b.ID] - 1
			}
		}
		builds := cells[name]
		switch {
		case times > 1:
			v.doubled = append(v.doubled, name)
		case len(builds) == 0:
			v.lost = append(v.lost, name+" has no build")
		case builds[0].State == api.Published:
			s.countPublished(t, builds[0], v)
		case builds[0].State == api.Failed && builds[0].Class != "" && builds[0].Error != "":
			v.failed++
			v.reasons[builds[0].Class]++
			if !apiBreak(name) {
				t.Logf("%s failed: %s: %s", name, builds[0].Class, builds[0].Error)
			}
		default:
			v.lost = append(v.lost, fmt.Sprintf("%s is %s without a reason", name, builds[0].State))
		}
	}
	s.findResumes(t, v, cells)
	return v
}

// countPublished counts a cell as published if the registry has the catalogue's artifact, and otherwise as lost.
func (s *faultRun) countPublished(t *testing.T, b api.Build, v *verdict) {
	t.Helper()
	ref, err := tagOf(s.url, b.Kernel.BuildID)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := digestOf(t.Context(), ref)
	if err != nil || digest != b.Digest {
		v.lost = append(v.lost, fmt.Sprintf("%s is published as %s, the registry has %s, %v", ref, b.Digest, digest, err))
		return
	}
	v.published++
}

// countAnnounced returns how many times each build became published, according to the server's log.
func (s *faultRun) countAnnounced(t *testing.T) map[int64]int {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(s.dir, "server.log"))
	if err != nil {
		t.Fatal(err)
	}
	times := map[int64]int{}
	for line := range strings.Lines(string(raw)) {
		_, rest, ok := strings.Cut(line, `"build changed" build=`)
		var id int64
		var state string
		if _, err := fmt.Sscanf(rest, "%d state=%s", &id, &state); ok && err == nil && state == string(api.Published) {
			times[id]++
		}
	}
	if len(times) == 0 {
		t.Errorf("the server's log has no line \"build changed\" for a published build; adapt countAnnounced to the log")
	}
	return times
}

// findResumes finds the attempts that a fault hit, and the time from each fault until the cell continued or finished.
func (s *faultRun) findResumes(t *testing.T, v *verdict, builds map[string][]api.Build) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(s.dir, "notes"))
	if err != nil {
		t.Fatal(err)
	}
	notes := map[string][]note{}
	for line := range bytes.Lines(raw) {
		var n note
		if err := json.Unmarshal(line, &n); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		if n.What == begin {
			v.attempts++
		}
		notes[n.Cell] = append(notes[n.Cell], n)
	}
	for _, blow := range s.faults {
		for name, of := range notes {
			slices.SortFunc(of, func(a, b note) int { return a.At.Compare(b.At) })
			at, found := slices.BinarySearchFunc(of, blow.at,
				func(n note, t time.Time) int { return cmp.Or(n.At.Compare(t), -1) })
			_ = found // a note with the time of the fault counts as written before the fault
			if at == 0 || of[at-1].Pid != blow.pid || of[at-1].What == broken {
				// The attempt ran in another process, or it had ended without an artifact before the fault.
				continue
			}
			var on time.Time // when the cell continued or finished
			for _, b := range builds[name] {
				if b.FinishedAt != nil && (on.IsZero() || b.FinishedAt.Before(on)) {
					on = *b.FinishedAt
				}
			}
			if !on.IsZero() && on.Before(blow.at) {
				continue
			}
			for _, n := range of[at:] {
				if n.What == begin && n.Pid != blow.pid && (on.IsZero() || n.At.Before(on)) {
					on = n.At
				}
			}
			v.interrupted++
			if on.IsZero() {
				v.lost = append(v.lost, name+" did not continue after a fault hit its builder")
				continue
			}
			if took := on.Sub(blow.at); took > v.resume {
				v.resume, v.slowest = took, fmt.Sprintf("%s, %s at %s", name, blow.what, blow.at.Format("15:04:05"))
			}
		}
	}
}

// table prints the verdict for people.
func (v *verdict) table(kills map[string]int) string {
	var out bytes.Buffer
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	for _, what := range slices.Sorted(maps.Keys(kills)) {
		fmt.Fprintf(w, "%s\t%d\n", what, kills[what])
	}
	for _, row := range []struct {
		name  string
		value any
	}{
		{"jobs", v.jobs}, {"published", v.published}, {"failed with a reason", fmt.Sprint(v.failed, " ", v.reasons)},
		{"doubled", len(v.doubled)}, {"lost", len(v.lost)}, {"left in the queue", v.left},
		{"attempts begun", v.attempts}, {"attempts interrupted", v.interrupted},
		{"longest resume", fmt.Sprintf("%.1f s (%s)", v.resume.Seconds(), v.slowest)},
		{"took", v.took.Round(time.Second)},
	} {
		fmt.Fprintf(w, "%s\t%v\n", row.name, row.value)
	}
	_ = w.Flush() // into a buffer
	return out.String()
}

// check compares the verdict with what the farm guarantees.
func (v *verdict) check(t *testing.T, run size) {
	t.Helper()
	if len(v.doubled) > 0 || len(v.lost) > 0 || v.left > 0 || v.published+v.failed != v.jobs {
		t.Errorf("%d published and %d failed of %d; doubled %v, lost %v, %d left in the queue; want every cell once",
			v.published, v.failed, v.jobs, v.doubled, v.lost, v.left)
	}
	breaks := 0
	for n := range v.jobs {
		if apiBreak(cell(n)) {
			breaks++
		}
	}
	if v.reasons[fault.APIBreak.String()] > breaks {
		t.Errorf("%d cells failed as an API break; want at most %d", v.reasons[fault.APIBreak.String()], breaks)
	}
	// A short run shares the machine with other tests, so it may take more than a minute.
	if run.long && v.resume > time.Minute {
		t.Errorf("a build continued %v after a fault (%s); want at most a minute", v.resume, v.slowest)
	}
}
