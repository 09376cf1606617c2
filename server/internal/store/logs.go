package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// Logs keeps build logs as files, <dir>/<build>.log.
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

func logName(build int64) string { return strconv.FormatInt(build, 10) + ".log" }

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
		err = fault.New(fault.TooLarge, fmt.Sprintf("the log is larger than %d MiB", api.MaxBuildLog>>20), "send its end only")
	}
	if err == nil {
		err = part.Sync()
	}
	if err = errors.Join(err, part.Close()); err != nil {
		err = fault.Disk(err, "free space for the server's data folder")
		return fmt.Errorf("store log of build %d: %w", build, err)
	}
	if err = l.root.Rename(filepath.Base(part.Name()), name); err != nil {
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

// Get opens a build's log; size is its length.
func (l *Logs) Get(build int64) (log io.ReadSeekCloser, size int64, err error) {
	f, err := l.root.Open(logName(build))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fault.New(
			fault.NotFound,
			fmt.Sprintf("build %d has no log yet", build),
			"ask again when the build has ended",
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
