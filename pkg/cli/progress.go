package cli

import (
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/prebake/prebake/pkg/timeline"
)

// IsTerminal reports whether w is a terminal.
func IsTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// Progress returns a callback that shows a timeline's events on w. On a terminal, it shows a moving line. Elsewhere, it
// prints a plain line at the beginning and the end of each phase.
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

// bar shows the running phase on the last line of a terminal, and the finished phases above it.
type bar struct {
	w  io.Writer
	mu sync.Mutex
	pb *progressbar.ProgressBar
}

func (b *bar) watch(e timeline.Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e.Done != nil {
		b.stop()
		fmt.Fprintln(b.w, doneLine(e.Done))
		return
	}
	if b.pb == nil {
		b.pb = progressbar.NewOptions(-1,
			progressbar.OptionSetWriter(b.w), progressbar.OptionSpinnerType(14), progressbar.OptionSetWidth(10),
			progressbar.OptionSetElapsedTime(true), progressbar.OptionClearOnFinish(), progressbar.OptionSetMaxDetailRow(0))
	}
	text := e.Phase
	if e.Text != "" {
		text += " " + e.Text
	}
	b.pb.Describe(fmt.Sprintf("%-46.46s", text))
	_ = b.pb.Add(1) // a broken terminal cannot show an error
}

func (b *bar) stop() {
	if b.pb == nil {
		return
	}
	_ = b.pb.Finish() // a broken terminal cannot show an error
	b.pb = nil
}
