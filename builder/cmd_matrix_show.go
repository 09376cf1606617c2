package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/prebake/prebake/builder/internal/batch"
	"github.com/prebake/prebake/pkg/cli"
)

// columns is the maximum width of the printed table, in characters.
const columns = 80

// cellTexts returns the texts of the columns kernel, driver and flavour for a job. If the plan found no kernel or no
// driver, the text is what the wish list asks for.
func cellTexts(j *batch.Job) (kernel, driver, flavour string) {
	kernel, driver, flavour = j.Cell.Kernel.String(), j.Cell.Driver.Version, string(j.Cell.Driver.Flavour)
	if j.Cell.Kernel.BuildID == "" {
		kernel = strings.Join(j.Cell.Asked, ", ")
		return kernel, "-", "-"
	}
	if driver == "" {
		driver, flavour = strings.Join(j.Cell.Asked, ", "), "-"
	}
	return kernel, driver, flavour
}

func title(j *batch.Job) string {
	kernel, driver, flavour := cellTexts(j)
	return strings.TrimSuffix(kernel+" "+driver+"-"+flavour, "--")
}

// shorten returns s, cut to at most n characters. A text that is cut ends in an ellipsis.
func shorten(s string, n int) string {
	if letters := []rune(s); len(letters) > n {
		return string(letters[:n-1]) + "…"
	}
	return s
}

// printMatrix writes a table with one row for each cell. Below the row of a failed cell it writes the reason.
func printMatrix(w io.Writer, r *batch.Report, took time.Duration) error {
	rows := [][4]string{{"KERNEL", "DRIVER", "FLAVOUR", "STATE"}}
	for _, j := range r.Jobs {
		kernel, driver, flavour := cellTexts(j)
		rows = append(rows, [4]string{kernel, driver, flavour, string(j.State)})
	}
	limits := [4]int{24, 18, 11, 11}
	var widths [4]int
	for _, row := range rows {
		for i, s := range row {
			widths[i] = max(widths[i], min(len([]rune(s)), limits[i]))
		}
	}
	out := &strings.Builder{}
	before := ""
	for i, row := range rows {
		for c, s := range row {
			fmt.Fprintf(out, "%-*s  ", widths[c], shorten(s, widths[c]))
		}
		if i == 0 {
			fmt.Fprintf(out, "%8s\n", "SECONDS")
			continue
		}
		j := r.Jobs[i-1]
		seconds := "-"
		if j.Seconds > 0 {
			seconds = fmt.Sprintf("%.1f", j.Seconds)
		}
		fmt.Fprintf(out, "%8s\n", seconds)
		why := ""
		if j.Failure != nil {
			why = reason(j)
			text := why
			if why == before {
				text = "as above"
			}
			for _, line := range wrapText(text, columns-4) {
				fmt.Fprintf(out, "    %s\n", line)
			}
			// A cell that was not tried has no log, so show the hint here.
			if hint := j.Failure.Hint; hint != "" && j.Attempts == 0 && text == why {
				for _, line := range wrapText("next: "+hint, columns-4) {
					fmt.Fprintf(out, "    %s\n", line)
				}
			}
		}
		before = why
	}
	fmt.Fprintln(out, summary(r, took))
	_, err := io.WriteString(w, out.String())
	return err
}

// reason explains why a cell is not published.
func reason(j *batch.Job) string {
	s := j.Failure.Class.String()
	if j.Cell.EarlyWarning {
		s = "early warning, " + s
	}
	if j.Known {
		s += ", as before"
	}
	if j.Like != "" {
		s += ", like " + j.Like
	}
	return s + ": " + j.Failure.Error
}

func cellsOf(n int) string {
	if n == 1 {
		return "1 cell"
	}
	return fmt.Sprintf("%d cells", n)
}

func summary(r *batch.Report, took time.Duration) string {
	var parts []string
	for _, s := range batch.States() {
		if n := r.States[s]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, s))
		}
	}
	text := fmt.Sprintf("%s: %s", cellsOf(len(r.Jobs)), strings.Join(parts, ", "))
	if took > 0 {
		text += fmt.Sprintf("; %.1f s", took.Seconds())
	}
	return text
}

// maxReason is the maximum number of characters of an error in the table.
const maxReason = 600

// wrapText splits a text into lines at its spaces. Only a word longer than a line is split.
func wrapText(text string, width int) []string {
	var lines []string
	line := []rune(nil)
	for _, word := range strings.Fields(shorten(text, maxReason)) {
		letters := []rune(word)
		if len(line) > 0 && len(line)+1+len(letters) > width {
			lines, line = append(lines, string(line)), nil
		}
		if len(line) > 0 {
			line = append(line, ' ')
		}
		for len(line)+len(letters) > width {
			fits := width - len(line)
			lines, line, letters = append(lines, string(line)+string(letters[:fits])), nil, letters[fits:]
		}
		line = append(line, letters...)
	}
	return append(lines, string(line))
}

// screen shows the progress of many cells. On a terminal, it shows one line for each cell. Elsewhere, it writes one
// line for each finished phase.
type screen struct {
	w    io.Writer
	bars *mpb.Progress // nil unless the output is a terminal

	mu    sync.Mutex
	lines map[int]*movingLine
}

type movingLine struct {
	bar   *mpb.Bar
	begin time.Time

	mu   sync.Mutex
	text string
}

func newScreen(w io.Writer) *screen {
	s := &screen{w: w, lines: map[int]*movingLine{}}
	if cli.IsTerminal(w) {
		s.bars = mpb.New(mpb.WithOutput(w), mpb.WithWidth(columns))
	}
	return s
}

func (s *screen) progress(text string) {
	if s.bars != nil {
		// The error is ignored, because there is no other place to report that the terminal fails.
		_, _ = s.bars.Write([]byte(text + "\n"))
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintln(s.w, text)
}

func (s *screen) watch(e batch.Event) {
	name := title(e.Job)
	switch e.Kind {
	case batch.Started:
		if s.bars == nil {
			s.progress(fmt.Sprintf("%s: begun", name))
			return
		}
		s.begin(e.Job.Index, name)
	case batch.Phase:
		switch {
		case s.bars != nil:
			s.move(e.Job.Index, name+" "+e.Phase.Phase+" "+e.Phase.Text)
		case e.Phase.Done != nil && e.Phase.Done.Of == "":
			s.progress(fmt.Sprintf("%s: %s %.1f s  %s", name, e.Phase.Phase, e.Phase.Done.Seconds, e.Phase.Done.Note))
		}
	case batch.Again:
		s.end(e.Job.Index)
		s.progress(fmt.Sprintf("%s: %v, will be tried again: %s", name, e.Failure.Class, e.Failure.Error))
	case batch.Fetch:
		s.progress(e.Text)
	case batch.Note:
		s.progress(fmt.Sprintf("%s: %s", name, e.Failure.Error))
	case batch.Settled:
		s.end(e.Job.Index)
		text := fmt.Sprintf("[%d/%d] %s: %s", e.Done, e.Total, name, e.Job.State)
		if e.Job.Failure != nil {
			text += " " + shorten(reason(e.Job), 2*columns)
		}
		s.progress(text)
	}
}

func (s *screen) begin(index int, name string) {
	m := &movingLine{begin: time.Now(), text: name}
	m.bar = s.bars.New(0, mpb.SpinnerStyle(), mpb.BarWidth(1), mpb.BarRemoveOnComplete(),
		mpb.AppendDecorators(decor.Any(func(decor.Statistics) string {
			m.mu.Lock()
			defer m.mu.Unlock()
			return fmt.Sprintf(" %-66.66s %6.0f s", m.text, time.Since(m.begin).Seconds())
		})))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines[index] = m
}

func (s *screen) move(index int, text string) {
	s.mu.Lock()
	m := s.lines[index]
	s.mu.Unlock()
	if m == nil {
		return
	}
	m.mu.Lock()
	m.text = text
	m.mu.Unlock()
	m.bar.Increment()
}

func (s *screen) end(index int) {
	s.mu.Lock()
	m := s.lines[index]
	delete(s.lines, index)
	s.mu.Unlock()
	if m != nil {
		m.bar.Abort(true)
	}
}

func (s *screen) close() {
	if s.bars != nil {
		s.bars.Wait()
	}
}
