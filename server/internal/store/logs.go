package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// Logs keeps build logs as files: <dir>/<build>.log is what a builder sent at the end, and
// <dir>/<build>.live what it has sent of a running build.
type Logs struct{ root *os.Root }

// OpenLogs opens the folder, making it if need be, and clears what an
// interrupted upload left behind.
func OpenLogs(dir string) (*Logs, error) {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, fmt.Errorf("open logs: %w", err)
	}
	stale, err := filepath.Glob(filepath.Join(dir, "*.part"))
	if err != nil {
		return nil, fmt.Errorf("open logs: %w", err)
	}
	for _, name := range stale {
		if err := os.Remove(name); err != nil {
			return nil, fmt.Errorf("open logs: %w", err)
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open logs: %w", err)
	}
	return &Logs{root}, nil
}

// Close closes the folder.
func (l *Logs) Close() error { return l.root.Close() }

func logName(build int64) string  { return strconv.FormatInt(build, 10) + ".log" }
func liveName(build int64) string { return strconv.FormatInt(build, 10) + ".live" }

// Append adds to the log of a running build. offset is where the text belongs, in bytes:
// 0 begins anew, and where the log does not end is kind Mismatch. At most api.MaxLiveLog
// bytes are kept.
func (l *Logs) Append(build, offset int64, r io.Reader) (err error) {
	flags := os.O_WRONLY
	if offset == 0 {
		flags |= os.O_CREATE | os.O_TRUNC
	}
	f, err := l.root.OpenFile(liveName(build), flags, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.Mismatch, fmt.Sprintf("the log of build %d has not been started", build),
			"send the log again from offset 0")
	}
	if err != nil {
		return fmt.Errorf("store log of build %d: %w", build, fault.Disk(err, "free space for the server's data folder"))
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("store log of build %d: %w", build, err)
	}
	if size := info.Size(); size != offset {
		return fault.New(
			fault.Mismatch,
			fmt.Sprintf("the log of build %d has %d bytes, and cannot continue at offset %d", build, size, offset),
			"send the log again from offset 0",
		)
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return fmt.Errorf("store log of build %d: %w", build, err)
	}
	n, err := io.Copy(f, io.LimitReader(r, api.MaxLiveLog-offset+1))
	if err == nil && offset+n > api.MaxLiveLog {
		err = fault.New(fault.TooLarge, fmt.Sprintf("the log of a build under way has %d MiB at most", api.MaxLiveLog>>20),
			"send all of it when the build has ended")
	}
	if err != nil { // a part is there whole, or not at all
		err = errors.Join(fault.Disk(err, "free space for the server's data folder"), f.Truncate(offset))
		return fmt.Errorf("store log of build %d: %w", build, err)
	}
	return nil
}

// Put stores a build's log in place of the one before; readers see the one or
// the other whole.
func (l *Logs) Put(build int64, r io.Reader) (err error) {
	name := logName(build)
	part, err := os.CreateTemp(l.root.Name(), name+".*.part")
	if err != nil {
		return fmt.Errorf("store log of build %d: %w", build, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, ignoreGone(os.Remove(part.Name())))
		}
	}()
	n, err := io.Copy(part, io.LimitReader(r, api.MaxBuildLog+1))
	if err == nil && n > api.MaxBuildLog {
		err = fault.New(fault.TooLarge, fmt.Sprintf("the log is larger than %d MiB", api.MaxBuildLog>>20),
			"send its end only")
	}
	if err == nil {
		err = part.Sync()
	}
	if err = errors.Join(err, part.Close()); err != nil {
		err = fault.Disk(err, "free space for the server's data folder")
		return fmt.Errorf("store log of build %d: %w", build, err)
	}
	err = l.root.Rename(filepath.Base(part.Name()), name)
	if err = errors.Join(err, ignoreGone(l.root.Remove(liveName(build)))); err != nil {
		return fmt.Errorf("store log of build %d: %w", build, err)
	}
	return nil
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Get opens a build's log, as far as it is there; size is its length. Of a running build,
// live is set: what it has sent goes before the log of an earlier try. When it has ended, what
// it sent as a whole goes before parts, of which one may come late.
func (l *Logs) Get(build int64, live bool) (log io.ReadSeekCloser, size int64, err error) {
	names := []string{logName(build), liveName(build)}
	if live {
		slices.Reverse(names)
	}
	f, err := l.root.Open(names[0])
	if errors.Is(err, fs.ErrNotExist) {
		f, err = l.root.Open(names[1])
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fault.New(
			fault.NotFound,
			fmt.Sprintf("build %d has no log yet", build),
			"ask again in a moment",
		)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("read log of build %d: %w", build, err)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("read log of build %d: %w", build, err), f.Close())
	}
	return f, info.Size(), nil
}
