package cli

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/prebake/prebake/pkg/timeline"
)

// IsTerminal reports whether w is a terminal.
func IsTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// Progress returns a watcher for a timeline: a moving line on a terminal, one
// plain line for each begun and finished phase elsewhere.
func Progress(w io.Writer) func(timeline.Event) {
	if IsTerminal(w) {
		return (&bar{w: w}).watch
	}
	return func(e timeline.Event) {
		switch {
		case e.Done != nil:
			fmt.Fprintln(w, doneLine(e.Done))
		case e.Text == "":
			fmt.Fprintf(w, "  ... %s\n", e.Phase)
		}
	}
}

func doneLine(p *timeline.Phase) string {
	mark := "ok"
	if p.Failed {
		mark = "FAIL"
	}
	name := p.Name
	if p.Of != "" {
		name = "- " + name
	}
	return fmt.Sprintf("  %-5s%-12s %7.1f s  %s", mark, name, p.Seconds, p.Note)
}

// barInterval is the pause between two drawings of a bar.
const barInterval = 200 * time.Millisecond

// bar shows the running phase on the last line and leaves one line for each
// finished phase above it.
type bar struct {
	w  io.Writer
	mu sync.Mutex
	// text is what the last line says since begun; stop ends what draws it. A nil stop is no
	// such line.
	text  string
	begun time.Time
	stop  chan struct{}
}

func (b *bar) watch(e timeline.Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e.Done != nil {
		if b.stop != nil {
			close(b.stop)
			b.stop = nil
			fmt.Fprint(b.w, "\r\x1b[K") // the whole line is free again
		}
		fmt.Fprintln(b.w, doneLine(e.Done))
		return
	}
	b.text = e.Phase
	if e.Text != "" {
		b.text += " " + e.Text
	}
	if b.stop == nil {
		b.begun, b.stop = time.Now(), make(chan struct{})
		go b.draw(b.stop)
	}
	b.line()
}

// draw writes the line again and again until stop is closed.
func (b *bar) draw(stop <-chan struct{}) {
	tick := time.NewTicker(barInterval)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		b.mu.Lock()
		select {
		case <-stop:
		default:
			b.line()
		}
		b.mu.Unlock()
	}
}

// line writes what runs, and for how long it has.
func (b *bar) line() {
	took := time.Since(b.begun)
	mark := `|/-\`[took/barInterval%4]
	fmt.Fprintf(b.w, "\r\x1b[K%c %-46.46s [%s]", mark, b.text, took.Round(time.Second))
}
