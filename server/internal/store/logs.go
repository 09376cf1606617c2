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
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// Logs stores build logs as files. A running build's log is in <dir>/<build>.live. The complete log is in
// <dir>/<build>.log.
type Logs struct {
	// CheckFree returns an error if there is no room for a log. nil means no check.
	CheckFree func() error

	root *os.Root
}

// OpenLogs opens the folder, or makes it. It removes the remains of interrupted uploads.
func OpenLogs(dir string) (*Logs, error) {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, fmt.Errorf("open the logs: %w", err)
	}
	stale, err := filepath.Glob(filepath.Join(dir, "*.part"))
	if err != nil {
		return nil, fmt.Errorf("open the logs: %w", err)
	}
	for _, name := range stale {
		if err := os.Remove(name); err != nil {
			return nil, fmt.Errorf("open the logs: %w", err)
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open the logs: %w", err)
	}
	return &Logs{root: root}, nil
}

// Close closes the folder.
func (l *Logs) Close() error { return l.root.Close() }

func (l *Logs) checkFree(build int64) error {
	if l.CheckFree == nil {
		return nil
	}
	if err := l.CheckFree(); err != nil {
		return fmt.Errorf("store the log of build %d: %w", build, err)
	}
	return nil
}

func logName(build int64) string  { return strconv.FormatInt(build, 10) + ".log" }
func liveName(build int64) string { return strconv.FormatInt(build, 10) + ".live" }

// Append adds text to the log of a running build, at an offset in bytes. Offset 0 starts the log again. If another
// offset is not the log's length, the error has kind Mismatch. The log is limited to api.MaxLiveLog bytes.
func (l *Logs) Append(build, offset int64, r io.Reader) (err error) {
	if err := l.checkFree(build); err != nil {
		return err
	}
	flags := os.O_WRONLY
	if offset == 0 {
		flags |= os.O_CREATE | os.O_TRUNC
	}
	f, err := l.root.OpenFile(liveName(build), flags, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.Mismatch, fmt.Sprintf("the log of build %d does not exist yet", build),
			"send the log again from offset 0")
	}
	if err != nil {
		return fmt.Errorf("store the log of build %d: %w", build,
			fault.Disk(err, "free space on the disk of the data folder"))
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("store the log of build %d: %w", build, err)
	}
	if size := info.Size(); size != offset {
		return fault.New(
			fault.Mismatch,
			fmt.Sprintf("the log of build %d has %d bytes, and cannot continue at offset %d", build, size, offset),
			"send the log again from offset 0",
		)
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return fmt.Errorf("store the log of build %d: %w", build, err)
	}
	n, err := io.Copy(f, io.LimitReader(r, api.MaxLiveLog-offset+1))
	if err == nil && offset+n > api.MaxLiveLog {
		err = fault.New(fault.TooLarge,
			fmt.Sprintf("the log is larger than %d MiB, and the build still runs", api.MaxLiveLog>>20),
			"send the whole log when the build has ended")
	}
	if err != nil { // half a part must not stay in the log
		err = errors.Join(fault.Disk(err, "free space on the disk of the data folder"), f.Truncate(offset))
		return fmt.Errorf("store the log of build %d: %w", build, err)
	}
	return nil
}

// Put stores the complete log of a build. Readers see either the earlier log or the new one.
func (l *Logs) Put(build int64, r io.Reader) (err error) {
	if err := l.checkFree(build); err != nil {
		return err
	}
	name := logName(build)
	part, err := os.CreateTemp(l.root.Name(), name+".*.part")
	if err != nil {
		return fmt.Errorf("store the log of build %d: %w", build, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, ignoreGone(os.Remove(part.Name())))
		}
	}()
	n, err := io.Copy(part, io.LimitReader(r, api.MaxBuildLog+1))
	if err == nil && n > api.MaxBuildLog {
		err = fault.New(fault.TooLarge, fmt.Sprintf("the log is larger than %d MiB", api.MaxBuildLog>>20),
			"send only the end of the log")
	}
	if err == nil {
		err = part.Sync()
	}
	if err = errors.Join(err, part.Close()); err != nil {
		err = fault.Disk(err, "free space on the disk of the data folder")
		return fmt.Errorf("store the log of build %d: %w", build, err)
	}
	err = l.root.Rename(filepath.Base(part.Name()), name)
	if err = errors.Join(err, ignoreGone(l.root.Remove(liveName(build)))); err != nil {
		return fmt.Errorf("store the log of build %d: %w", build, err)
	}
	return nil
}

// logsPerRead is the number of names that Trim reads from the folder at a time.
const logsPerRead = 1000

// Trim finds logs that were last written before the given time, and passes their builds to choose, at most logsPerRead
// at a time. It removes the logs of the builds that choose returns, and returns the number of removed files.
func (l *Logs) Trim(before time.Time, choose func(builds []int64) ([]int64, error)) (removed int, err error) {
	dir, err := l.root.Open(".")
	if err != nil {
		return 0, fmt.Errorf("find old logs: %w", err)
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	for {
		entries, err := dir.ReadDir(logsPerRead)
		if errors.Is(err, io.EOF) {
			return removed, nil
		}
		if err != nil {
			return removed, fmt.Errorf("find old logs: %w", err)
		}
		n, err := l.trimSome(entries, before, choose)
		removed += n
		if err != nil {
			return removed, err
		}
	}
}

// trimSome is [Logs.Trim] for some entries of the folder.
func (l *Logs) trimSome(
	entries []fs.DirEntry, before time.Time, choose func(builds []int64) ([]int64, error),
) (removed int, err error) {
	var names []string
	var builds []int64
	for _, e := range entries {
		build, ok := buildOf(e.Name())
		if !ok {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && !info.ModTime().Before(before) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("find old logs: %w", err)
		}
		names, builds = append(names, e.Name()), append(builds, build)
	}
	if len(builds) == 0 {
		return 0, nil
	}
	chosen, err := choose(builds)
	if err != nil {
		return 0, err
	}
	remove := map[int64]bool{}
	for _, build := range chosen {
		remove[build] = true
	}
	for i, build := range builds {
		if !remove[build] {
			continue
		}
		if err := ignoreGone(l.root.Remove(names[i])); err != nil {
			return removed, fmt.Errorf("remove the log of build %d: %w", build, err)
		}
		removed++
	}
	return removed, nil
}

// buildOf returns the number of the build whose log has this name.
func buildOf(name string) (build int64, ok bool) {
	number, isLog := strings.CutSuffix(name, ".log")
	if !isLog {
		number, isLog = strings.CutSuffix(name, ".live")
	}
	build, err := strconv.ParseInt(number, 10, 64)
	return build, isLog && err == nil
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Get opens the log of a build, and returns its length in bytes. For a running build, it prefers the live log, because
// a complete log is from an earlier attempt. For an ended build, it prefers the complete log. Without a log, the error
// has kind NotFound; the caller of Get knows why there is none.
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
		return nil, 0, fault.New(fault.NotFound, fmt.Sprintf("build %d has no log", build), "")
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
