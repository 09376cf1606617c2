package localbuild

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/fault"
)

// failures stores what cannot be compiled on this node: a driver that does not know the
// kernel's interface will not know it in ten minutes. It is a help, and no more than that:
// what cannot be read is none.
type failures struct {
	file    string
	builder string // which one failed, out of which mirrors
}

// failure is one of them.
type failure struct {
	Cell    string     `json:"cell"`
	Builder string     `json:"builder"`
	Kind    fault.Kind `json:"kind"`
	Text    string     `json:"text"`
	Hint    string     `json:"hint,omitempty"`
	At      time.Time  `json:"at"`
}

// failureAge is how long one counts: mirrors and builders change.
const failureAge = 24 * time.Hour

func (b Builder) failures() failures {
	f := failures{file: filepath.Join(b.StateDir, "failed.json"), builder: b.KernelMirror + " " + b.DriverMirror + " "}
	if b.Image != nil {
		f.builder += b.Image.Digest
	} else if info, err := os.Stat(b.Program); err == nil { // another release has the same name
		f.builder += fmt.Sprintf("%s %d %d", b.Program, info.Size(), info.ModTime().UnixNano())
	}
	return f
}

func cell(q resolve.Question) string {
	return fmt.Sprintf("%s/%s %s %s", q.Kernel.BuildID, q.Kernel.Board, q.Wish, q.Flavour)
}

// known returns why this was not to be compiled a while ago.
func (f failures) known(q resolve.Question) error {
	raw, err := os.ReadFile(f.file)
	var last failure
	if err != nil || json.Unmarshal(raw, &last) != nil {
		return nil
	}
	if last.Cell != cell(q) || last.Builder != f.builder || time.Since(last.At) > failureAge ||
		time.Since(last.At) < 0 {
		return nil
	}
	return fault.New(
		last.Kind,
		fmt.Sprintf(
			"%s (at %s; it is tried again after a day, or by fetcher install --retry)",
			last.Text,
			last.At.Format(time.RFC3339),
		),
		last.Hint,
	)
}

// remember keeps an error that will be the same the next time.
func (f failures) remember(q resolve.Question, err error) error {
	if !fault.Is(err, fault.APIBreak) && !fault.Is(err, fault.Unsupported) {
		return nil
	}
	raw, merr := json.Marshal(
		failure{cell(q), f.builder, fault.Of(err), err.Error(), fault.Hint(err), time.Now().UTC()},
	)
	if merr != nil {
		return merr
	}
	if werr := os.WriteFile(f.file, raw, 0o600); werr != nil {
		return fmt.Errorf("record the failed compile: %w", werr)
	}
	return nil
}
