package compile

import (
	"bytes"
	"io"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/timeline"
)

// The phases of one make run, in order.
const (
	phaseConftest = "conftest"
	phaseCompile  = "compile"
	phaseLink     = "link"
)

// work is the expected number of steps of each phase.
type work struct{ conftest, compile, link int }

func (w work) of(phase string) int {
	switch phase {
	case phaseConftest:
		return w.conftest
	case phaseCompile:
		return w.compile
	}
	return w.link
}

var (
	conftestList = regexp.MustCompile(`^\s*NV_CONFTEST_[A-Z]+_COMPILE_TESTS\s*\+=\s*(.*)$`)
	headerList   = regexp.MustCompile(`^\s*NV_HEADER_PRESENCE_TESTS\s*=`)
	checkList    = regexp.MustCompile(`^\s*BUILD_SANITY_CHECKS\s*=`)
	sourceName   = regexp.MustCompile(`[\w./-]+\.c\b`)
	objectList   = regexp.MustCompile(`^\s*obj-m\s*[+:]?=\s*(.*)$`)
)

// countWork counts the steps that `make` will take, for the progress display only.
func countWork(src string) work {
	tests, sources, modules := map[string]bool{}, map[string]bool{}, map[string]bool{}
	_ = walkHost(src, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || entry.Name() != "Kbuild" && filepath.Ext(path) != ".Kbuild" {
			return nil
		}
		text, err := readHost(path)
		if err != nil {
			return nil
		}
		list := "" // prefix for the words of a list; backslashes continue a list over several lines
		for line := range strings.Lines(string(text)) {
			line, more := strings.CutSuffix(strings.TrimRight(line, " \t\r\n"), `\`)
			switch {
			case headerList.MatchString(line):
				list = "header "
			case checkList.MatchString(line):
				list = "check "
			case list != "":
				for _, word := range strings.Fields(line) {
					tests[list+word] = true
				}
			}
			if !more {
				list = ""
			}
			if m := conftestList.FindStringSubmatch(line); m != nil {
				for _, word := range strings.Fields(m[1]) {
					tests[word] = true
				}
			}
			if m := objectList.FindStringSubmatch(line); m != nil {
				for _, word := range strings.Fields(m[1]) {
					modules[word] = true
				}
			}
			if strings.Contains(line, "SOURCES") {
				for _, name := range sourceName.FindAllString(line, -1) {
					sources[name] = true
				}
			}
		}
		return nil
	})
	return work{conftest: len(tests), compile: len(sources), link: 2 * len(modules)}
}

// maxLine is the number of bytes that a watch examines at the start of each line.
const maxLine = 64 << 10

// watch reads the output of `make` and passes every byte to the log. It counts steps, measures the phases, and collects
// the findings for a diagnosis. Only one goroutine may write to it at a time.
type watch struct {
	log      io.Writer
	logErr   error
	progress func(phase string, done, total int)
	expect   work
	now      func() time.Time

	line     []byte
	phase    string
	started  time.Time
	done     int
	reused   map[string]int // steps of each phase whose results came from the cache
	phases   []timeline.Phase
	findings findings
}

func newWatch(log io.Writer, progress func(string, int, int), expect work, now func() time.Time) *watch {
	return &watch{log: log, progress: progress, expect: expect, now: now, started: now(), reused: map[string]int{}}
}

// reuse adds n to the number of a phase's steps whose results came from the cache.
func (w *watch) reuse(phase string, n int) {
	if n == 0 {
		return
	}
	w.reused[phase] += n
	if phase == phaseConftest && w.phase == "" {
		w.phase = phase
	}
	if phase == w.phase {
		done := w.done + w.reused[phase]
		w.progress(phase, done, max(done, w.expect.of(phase)))
	}
}

// note returns the text for timeline.Phase.Note, such as "6 tests, 5 remembered". done is the number of steps that ran,
// without the reused ones.
func (w *watch) note(phase string, done int) string {
	what := map[string][2]string{phaseConftest: {"test", "remembered"}, phaseCompile: {"file", "reused"},
		phaseLink: {"step", ""}}[phase]
	text := count(done+w.reused[phase], what[0])
	if n := w.reused[phase]; n > 0 {
		text += ", " + strconv.Itoa(n) + " " + what[1]
	}
	return text
}

func (w *watch) Write(p []byte) (int, error) {
	// After an error of the log, Write still accepts all output. Otherwise a broken pipe would end the compiler and hide
	// the real reason. close returns the log's error.
	if w.logErr == nil {
		_, w.logErr = w.log.Write(p)
	}
	for rest := p; len(rest) > 0; {
		part, after, found := bytes.Cut(rest, []byte("\n"))
		w.line = append(w.line, part[:min(len(part), maxLine-len(w.line))]...)
		if found {
			w.read(string(w.line))
			w.line = w.line[:0]
		}
		rest = after
	}
	return len(p), nil
}

// close reads the last line, ends the running phase and returns the log's error.
func (w *watch) close(failed bool) error {
	if len(w.line) > 0 {
		w.read(string(w.line))
		w.line = w.line[:0]
	}
	w.end(failed)
	return w.logErr
}

func (w *watch) end(failed bool) {
	if w.phase == "" {
		return
	}
	now := w.now()
	w.phases = append(w.phases, timeline.Phase{
		Name: w.phase, Start: w.started.UTC(), Seconds: now.Sub(w.started).Seconds(),
		Note: w.note(w.phase, w.done), Failed: failed,
	})
	w.phase, w.started, w.done = "", now, 0
}

// stepLine matches the line that `make` prints for each step.
var stepLine = regexp.MustCompile(`^ +(CONFTEST|CC \[M\]|AS \[M\]|LD \[M\]|MODPOST)[: ]? *(\S*)(.*)$`)

func (w *watch) read(line string) {
	w.findings.read(line)
	m := stepLine.FindStringSubmatch(line)
	if m == nil {
		return
	}
	phase := w.phase
	switch what, name := m[1], m[2]; what {
	case "CONFTEST":
		// A name with a colon, as in "CONFTEST headers.h:", announces a finished header, not a test.
		if strings.HasSuffix(name, ":") {
			return
		}
		phase = phaseConftest
	case "CC [M]", "AS [M]":
		if phase != phaseLink { // `make` compiles the .mod.c files in the link phase
			phase = phaseCompile
		}
	case "MODPOST":
		phase = phaseLink
	default:
		if phase != phaseLink { // `make` links parts of a module while it still compiles other files
			return
		}
	}
	// If every object came from the cache, `make` compiles nothing. w.phases still lists the compile phase.
	if phase == phaseLink && w.phase != phaseCompile && w.phase != phaseLink && w.reused[phaseCompile] > 0 {
		w.end(false)
		w.phase = phaseCompile
	}
	// The conftest phase is always the first one. A later conftest line does not return to it.
	if w.phase != phase && (w.phase == "" || phase != phaseConftest) {
		w.end(false)
		w.phase = phase
	}
	if phase == w.phase && m[1] != "MODPOST" {
		w.done++
	}
	done := w.done + w.reused[w.phase]
	w.progress(w.phase, done, max(done, w.expect.of(w.phase)))
}
