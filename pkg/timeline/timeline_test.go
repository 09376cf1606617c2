package timeline_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/timeline"
)

func TestRun(t *testing.T) {
	t.Parallel()
	clock := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var events []string
	r := &timeline.Run{
		Now: func() time.Time { clock = clock.Add(time.Second); return clock },
		Watch: func(e timeline.Event) {
			text := e.Phase
			if e.Done != nil {
				text += " done"
			}
			events = append(events, strings.TrimSpace(text+" "+e.Text))
		},
	}
	if err := r.Do("fetch", func() (string, error) {
		r.Progress("fetch", "%d bytes",
			7)
		return "7 bytes", nil
	}); err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	if err := r.Do("load", func() (string, error) { return "", boom }); !errors.Is(err, boom) {
		t.Errorf("Do = %v; want %v", err, boom)
	}
	want := []timeline.Phase{
		{Name: "fetch", Start: time.Date(2026, 1, 2, 3, 4, 6, 0, time.UTC), Seconds: 1, Note: "7 bytes"},
		{Name: "load", Start: time.Date(2026, 1, 2, 3, 4, 8, 0, time.UTC), Seconds: 1, Failed: true},
	}
	if diff := cmp.Diff(want, r.Phases()); diff != "" {
		t.Errorf("Phases (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"fetch", "fetch 7 bytes", "fetch done", "load", "load done"}, events); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	r.Add(timeline.Phase{Name: "read", Of: "load", Seconds: 0.5})
	var out strings.Builder
	if err := timeline.Print(&out, "node", r.Phases()); err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(out.String(), "\n") {
		if len(line) > 80 {
			t.Errorf("line of %d columns: %q", len(line), line)
		}
	}
	if !strings.Contains(out.String(), "- read") || !strings.Contains(out.String(), "total              2.00 s") {
		t.Errorf("a part of a phase is not shown as one, or counts twice:\n%s", out.String())
	}
	if !strings.Contains(out.String(), "x load") || !strings.Contains(out.String(), "7 bytes") {
		t.Errorf("table lacks the failed phase or the note:\n%s", out.String())
	}
}

// TestTotal checks that a part of a phase is printed, but that its time is not added to the total a second time.
func TestTotal(t *testing.T) {
	t.Parallel()
	phases := []timeline.Phase{
		{Name: "source", Seconds: 1}, {Name: "conftest", Of: "compile", Seconds: 20},
		{Name: "compile", Of: "compile", Seconds: 100}, {Name: "compile", Seconds: 121, Note: strings.Repeat("ü", 60)},
	}
	if got := timeline.Total(phases); got != 122 {
		t.Errorf("Total = %v; want 122", got)
	}
	var out strings.Builder
	if err := timeline.Print(&out, "builder", phases); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "122.00 s\n") || !strings.Contains(out.String(), strings.Repeat("ü", 47)+"...\n") {
		t.Errorf("Print wrote\n%s\nwant a total of 122 s and whole letters", out.String())
	}
}
