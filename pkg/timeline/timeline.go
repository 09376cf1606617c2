// Package timeline records the phases of one run, such as a build or an installation: the name, start and duration of
// each. It does not decide how to display them; the caller passes a function for that.
package timeline

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// Phase is one finished step.
type Phase struct {
	Name  string    `json:"name"`
	Start time.Time `json:"start"`
	// Seconds is the wall-clock duration.
	Seconds float64 `json:"seconds"`
	// Note is a fact for the reader, such as "cached", a size or a count. It may be empty.
	Note string `json:"note,omitempty"`
	// Of is the name of the phase that contains this one, and whose time includes it. It may be empty.
	Of string `json:"of,omitempty"`
	// Failed is true if the phase ended in an error.
	Failed bool `json:"failed,omitempty"`
}

// Event tells a watcher that a phase began, ended or made progress.
type Event struct {
	Phase string
	// Done is the finished phase; it is nil while the phase runs.
	Done *Phase
	// Text is a progress line of a running phase. It may be empty.
	Text string
}

// Run collects the phases of one run. The zero value is ready to use, and displays nothing.
type Run struct {
	// Watch is called for every event, in order, never concurrently; may be nil.
	Watch func(Event)
	// Now is the clock; nil means time.Now.
	Now func() time.Time

	mu     sync.Mutex
	phases []Phase
}

func (r *Run) now() time.Time {
	if r.Now != nil {
		return r.Now()
	}
	return time.Now()
}

func (r *Run) emit(e Event) {
	if r.Watch != nil {
		r.Watch(e)
	}
}

// Do runs a callback as a phase and records the phase, even if the callback fails. The callback returns the note of the
// phase. Do returns the callback's error unchanged.
func (r *Run) Do(name string, f func() (note string, err error)) error {
	start := r.now()
	r.mu.Lock()
	r.emit(Event{Phase: name})
	r.mu.Unlock()
	note, err := f()
	p := Phase{Name: name, Start: start.UTC(), Seconds: r.now().Sub(start).Seconds(), Note: note, Failed: err != nil}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.phases = append(r.phases, p)
	r.emit(Event{Phase: name, Done: &p})
	return err
}

// Progress tells the watcher about progress inside a running phase.
func (r *Run) Progress(phase, format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.emit(Event{Phase: phase, Text: fmt.Sprintf(format, args...)})
}

// Add records a phase that was measured elsewhere, such as inside a sandbox.
func (r *Run) Add(p Phase) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.phases = append(r.phases, p)
	r.emit(Event{Phase: p.Name, Done: &p})
}

// Phases returns a copy of the phases that were recorded so far.
func (r *Run) Phases() []Phase {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Phase(nil), r.phases...)
}

// Total returns the time of all phases in seconds, without phases that are part of another phase.
func Total(phases []Phase) (seconds float64) {
	for _, p := range phases {
		if p.Of == "" {
			seconds += p.Seconds
		}
	}
	return seconds
}

// Print writes phases as a table of at most 80 columns.
func Print(w io.Writer, title string, phases []Phase) error {
	if _, err := fmt.Fprintf(w, "%s\n", title); err != nil {
		return err
	}
	for _, p := range phases {
		mark, name := " ", p.Name
		if p.Of != "" {
			name = "- " + name
		}
		if p.Failed {
			mark = "x"
		}
		note := p.Note
		if letters := []rune(note); len(letters) > 50 {
			note = string(letters[:47]) + "..."
		}
		if _, err := fmt.Fprintf(w, " %s %-14s %8.2f s  %s\n", mark, name, p.Seconds, note); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "   %-14s %8.2f s\n", "total", Total(phases))
	return err
}
