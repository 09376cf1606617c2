package localbuild

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
)

// failures has the files about the last failed compile of this node, and about the compile that runs. They only save
// time, so an unreadable file counts as empty.
type failures struct {
	file    string // the last failed compile
	running string // the compile that runs, or the last one that was killed with this program or lacked memory
	builder string // the builder that failed, and its mirrors
}

type failure struct {
	Cell    string     `json:"cell"`
	Builder string     `json:"builder"`
	Kind    fault.Kind `json:"kind"`
	Text    string     `json:"text"`
	Hint    string     `json:"hint,omitempty"`
	At      time.Time  `json:"at"`
	// Tries counts the compiles in a row that ended with this kind.
	Tries int `json:"tries,omitempty"`
}

// failureAge is how long a failure is remembered. It is limited, because mirrors and builders change.
const failureAge = 24 * time.Hour

// firstPause is how long a full disk or an exceeded time limit is remembered the first time. Each further time, the
// pause doubles, up to longestPause. Otherwise a node whose disk or time never suffices would compile at each restart
// of the pod.
const firstPause = 10 * time.Minute

// longestPause returns the maximum pause after a failure of this kind. After a full disk the pause is short, because
// the disk may have space again at any time, and nobody can measure how much the next compile needs.
func longestPause(kind fault.Kind) time.Duration {
	if kind == fault.DiskFull {
		return time.Hour
	}
	return failureAge
}

// pause returns how long this failure is remembered.
func (f failure) pause() time.Duration {
	longest := longestPause(f.Kind)
	if !pauses(f.Kind) {
		return longest
	}
	pause := firstPause
	for i := 1; i < f.Tries && pause < longest; i++ {
		pause *= 2
	}
	return min(pause, longest)
}

// pauses reports whether the compile may succeed later, but not soon.
func pauses(kind fault.Kind) bool { return kind == fault.DiskFull || kind == fault.TimedOut }

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

// last returns the record of the last failed compile. It returns the zero value if that compile was for another cell or
// builder, or if its time is in the future.
func (f failures) last(q resolve.Question) (last failure) {
	raw, err := os.ReadFile(f.file)
	if err != nil || json.Unmarshal(raw, &last) != nil || last.Cell != cell(q) || last.Builder != f.builder ||
		time.Since(last.At) < 0 {
		return failure{}
	}
	return last
}

// lastError returns the error of the last failed compile if that compile was for q's cell with this builder, and the
// pause before the next attempt is not over. Otherwise it returns nil.
func (f failures) lastError(q resolve.Question) error {
	last := f.last(q)
	if last.At.IsZero() || time.Since(last.At) > last.pause() {
		return nil
	}
	return fault.New(last.Kind, fmt.Sprintf(
		"%s (failed at %s; this node compiles again after %s, or with \"fetcher install --retry\")", last.Text,
		last.At.Format(time.RFC3339), last.At.Add(last.pause()).Format(time.RFC3339)), last.Hint)
}

// store writes the error of a failed compile into the file, unless the next compile may succeed. So it does not write
// an error of kind Internal, which may come from a broken machine, or of a builder that did not start, because it may
// have lacked memory.
//
// If the disk is full, store writes into the file about the running compile (running) and renames that file. It does
// not do so if last, the record that [failures.tries] returned, counts earlier compiles, because end then writes last
// into the file running again.
func (f failures) store(q resolve.Question, err error, last compiling) error {
	kind := fault.Of(err)
	if err == nil || kind.Retryable() && !pauses(kind) || kind == fault.Internal || errors.Is(err, errNotStarted) {
		return nil
	}
	now := failure{Cell: cell(q), Builder: f.builder, Kind: kind, Text: clip(err.Error(), 2000),
		Hint: clip(fault.Hint(err), 1000), At: time.Now().UTC(), Tries: 1}
	if was := f.last(q); was.Kind == kind && now.At.Sub(was.At) < 2*failureAge {
		now.Tries = was.Tries + 1
	}
	raw, merr := json.Marshal(now)
	if merr != nil {
		return merr
	}
	werr := overwrite(f.file, raw)
	if fault.NoSpace(werr) && last.Tries == 0 {
		if werr = overwrite(f.running, raw); werr == nil {
			werr = os.Rename(f.running, f.file)
		}
	}
	if werr != nil {
		return fmt.Errorf("store the error of the failed compile: %w", werr)
	}
	return nil
}

// forget removes the record of the last failure if that was for q's cell with this builder. Call it after a successful
// compile.
func (f failures) forget(q resolve.Question) error {
	if f.last(q).At.IsZero() {
		return nil
	}
	return os.Remove(f.file)
}

// overwrite replaces the content of a file in place, so that the new content takes the space of the former one.
func overwrite(name string, raw []byte) error {
	file, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = file.WriteAt(raw, 0)
	return errors.Join(err, file.Truncate(int64(len(raw))), file.Close())
}

// clip shortens a text to at most size bytes.
func clip(text string, size int) string {
	return strings.ToValidUTF8(text[:min(len(text), size)], "")
}

// compiling describes a compile that runs, or that lacked memory.
type compiling struct {
	Cell    string `json:"cell"`
	Builder string `json:"builder"`
	// BootID is the id of the boot. A reboot is no sign that the compile needs too much.
	BootID string `json:"bootId"`
	// Limit is the memory limit in bytes; 0 means none.
	Limit int64 `json:"memoryLimit"`
	// Tries counts the compiles that did not end or lacked memory, including this one.
	Tries int       `json:"tries"`
	At    time.Time `json:"at"`
}

// maxTries is how often a compile may lack memory in one boot, until it is not tried again. If a container exceeds its
// memory limit, the kernel kills all of its processes, or only one. Since Kubernetes 1.28, kubelet's default is to kill
// all (memory.oom.group). The kernel kills one with control groups of version 1, or with kubelet's
// singleProcessOOMKill. In either case, kubelet starts the container again, so without a limit the node would compile
// endlessly.
const maxTries = 2

// tries returns the record of a compile that begins now, and the record of the last one that lacked memory. The second
// record is zero if that compile had another cell, builder, boot or memory limit. After maxTries such compiles, tries
// returns an error. The caller holds the lock of [lockCompiles], because a compile that runs looks like one that was
// killed.
func (f failures) tries(q resolve.Question, retry bool) (now, last compiling, err error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return now, last, fmt.Errorf("read boot id: %w", err)
	}
	now = compiling{Cell: cell(q), Builder: f.builder, BootID: strings.TrimSpace(string(boot)),
		Limit: sandbox.MemoryLimit(), At: time.Now().UTC()}
	raw, rerr := os.ReadFile(f.running)
	if rerr != nil || json.Unmarshal(raw, &last) != nil || retry || last.Cell != now.Cell ||
		last.Builder != now.Builder || last.BootID != now.BootID || last.Limit != now.Limit ||
		now.At.Sub(last.At).Abs() >= failureAge {
		last = compiling{}
	}
	if last.Tries >= maxTries {
		return now, last, outOfMemory(fmt.Sprintf("compile on this node: the last %d compiles of this driver ran out of "+
			"memory, or were killed together with the fetcher, probably for the same reason; the last one began at %s (this "+
			"node compiles again after a day, after a reboot, or with \"fetcher install --retry\")", last.Tries,
			last.At.Format(time.RFC3339)), now.Limit)
	}
	now.Tries = last.Tries + 1
	return now, last, nil
}

// begin records that a compile begins.
func (f failures) begin(now compiling) error {
	if err := f.writeRunning(now); err != nil {
		return fault.Disk(fmt.Errorf("record that a compile begins: %w", err),
			"make space on the disk of "+filepath.Dir(f.running))
	}
	return nil
}

// end records that a compile ended with the error failed, or with nil. After a lack of memory, the record of this
// compile stays. After another error, end writes the record last again if last counts earlier compiles, because the
// error says nothing about memory. In all other cases, end removes the record.
func (f failures) end(last compiling, failed error) (err error) {
	switch {
	case lackedMemory(failed):
		return nil
	case failed != nil && last.Tries > 0:
		err = f.writeRunning(last)
	default:
		err = os.Remove(f.running)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("record that the compile ended: %w", err)
	}
	return nil
}

func (f failures) writeRunning(c compiling) error {
	raw, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return overwrite(f.running, raw)
}

// lackedMemory reports whether a compile ended for lack of memory. A builder that was killed counts, too: a process
// that cannot see its control group does not learn the reason.
func lackedMemory(err error) bool {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		status, ok := exit.Sys().(syscall.WaitStatus)
		return ok && status.Signaled() && status.Signal() == syscall.SIGKILL
	}
	return fault.Is(err, fault.OutOfMemory)
}
