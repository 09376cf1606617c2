package localbuild

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
)

// failures has the files about the last failed compile of this node, and about the compile that runs. They only save
// time, so an unreadable file counts as empty.
type failures struct {
	file    string // the last failed compile
	running string // the compile that runs, or that was killed together with this program
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
	f := failures{file: filepath.Join(b.StateDir, "failed.json"), running: filepath.Join(b.StateDir, "compiling.json"),
		builder: b.KernelMirror + " " + b.DriverMirror + " "}
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
			"%s (failed at %s; this node compiles again after a day, or with \"fetcher install --retry\")",
			last.Text,
			last.At.Format(time.RFC3339),
		),
		last.Hint,
	)
}

// store writes an error into the file, unless the next compile may succeed. An error of kind Internal may come from a
// broken machine. A builder that did not start may have lacked memory.
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

// compiling describes a compile that runs. The file is removed when the compile ends, so it stays if this program is
// killed.
type compiling struct {
	Cell    string `json:"cell"`
	Builder string `json:"builder"`
	// BootID is the id of the boot. A reboot is no sign that the compile needs too much.
	BootID string `json:"bootId"`
	// Limit is the memory limit in bytes; 0 means none.
	Limit int64 `json:"memoryLimit"`
	// Tries counts the compiles that began and did not end, with this one.
	Tries int       `json:"tries"`
	At    time.Time `json:"at"`
}

// maxKilled is how often a compile may be killed together with this program, until it is not tried again. By default,
// kubelet lets the kernel kill all programs of a container if one of them exceeds the memory limit (memory.oom.group,
// since Kubernetes 1.28), and then starts the container again.
const maxKilled = 2

// begin records that a compile begins. It returns an error if the last ones of the same cell, builder, boot and memory
// limit were killed together with this program.
func (f failures) begin(q resolve.Question, retry bool) error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("read boot id: %w", err)
	}
	now := compiling{Cell: cell(q), Builder: f.builder, BootID: strings.TrimSpace(string(boot)),
		Limit: sandbox.MemoryLimit(), At: time.Now().UTC()}
	var last compiling
	if raw, err := os.ReadFile(f.running); err == nil && json.Unmarshal(raw, &last) == nil && !retry &&
		last.Cell == now.Cell && last.Builder == now.Builder && last.BootID == now.BootID && last.Limit == now.Limit &&
		now.At.Sub(last.At).Abs() < failureAge {
		if now.Tries = last.Tries; now.Tries >= maxKilled {
			return outOfMemory(fmt.Sprintf("compile on this node: the last %d compiles of this driver were killed together "+
				"with the fetcher, the last one after %s; the likely reason is that they needed too much memory (this node "+
				"compiles again after a day, or with \"fetcher install --retry\")", now.Tries, last.At.Format(time.RFC3339)),
				now.Limit)
		}
	}
	now.Tries++
	raw, err := json.Marshal(now)
	if err == nil {
		err = os.WriteFile(f.running, raw, 0o600)
	}
	if err != nil {
		return fault.Disk(fmt.Errorf("record that a compile began: %w", err),
			"make space on the disk of "+filepath.Dir(f.running))
	}
	return nil
}

// end records that the compile ended, in any way.
func (f failures) end() error {
	if err := os.Remove(f.running); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("record that the compile ended: %w", err)
	}
	return nil
}
