package localbuild

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/fault"
)

// failures is the file with the last failed compile of this node. It only saves time, so an unreadable file counts as
// empty.
type failures struct {
	file    string
	builder string // the builder that failed, and its mirrors
}

type failure struct {
	Cell    string     `json:"cell"`
	Builder string     `json:"builder"`
	Kind    fault.Kind `json:"kind"`
	Text    string     `json:"text"`
	Hint    string     `json:"hint,omitempty"`
	At      time.Time  `json:"at"`
}

// failureAge is how long a failure is remembered, because mirrors and builders change.
const failureAge = 24 * time.Hour

func (b Builder) failures() failures {
	f := failures{file: filepath.Join(b.StateDir, "failed.json"), builder: b.KernelMirror + " " + b.DriverMirror + " "}
	if b.Image != nil {
		f.builder += b.Image.Digest
	} else if info, err := os.Stat(b.Program); err == nil { // size and time: another release may have this path
		f.builder += fmt.Sprintf("%s %d %d", b.Program, info.Size(), info.ModTime().UnixNano())
	}
	return f
}

func cell(q resolve.Question) string {
	return fmt.Sprintf("%s/%s %s %s", q.Kernel.BuildID, q.Kernel.Board, q.Wish, q.Flavour)
}

// lastError returns the error of the last failed compile if it had the same cell and builder, and is younger than
// failureAge. Otherwise it returns nil.
func (f failures) lastError(q resolve.Question) error {
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
			"%s (failed at %s; this node compiles again after a day, or with fetcher install --retry)",
			last.Text,
			last.At.Format(time.RFC3339),
		),
		last.Hint,
	)
}

// store writes an error into the file, unless the next compile may succeed. A broken machine may be the cause of an
// error of kind Internal, and a lack of memory that of a builder that did not start.
func (f failures) store(q resolve.Question, err error) error {
	if err == nil || fault.Of(err).Retryable() || fault.Is(err, fault.Internal) || errors.Is(err, errNotStarted) {
		return nil
	}
	raw, merr := json.Marshal(
		failure{cell(q), f.builder, fault.Of(err), err.Error(), fault.Hint(err), time.Now().UTC()},
	)
	if merr != nil {
		return merr
	}
	if werr := os.WriteFile(f.file, raw, 0o600); werr != nil {
		return fmt.Errorf("store the error of the failed compile: %w", werr)
	}
	return nil
}
