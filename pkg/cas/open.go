package cas

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gofrs/flock"

	"github.com/prebake/prebake/pkg/fault"
)

// Open opens the cache in dir, and makes the folder if it is missing. If the folder has files and is not a cache, the
// error is of kind Usage.
func Open(dir string) (*Cache, error) {
	c, err := openFolder(dir)
	if err != nil {
		return nil, denied(err)
	}
	return c, nil
}

// denied adds a hint to the error about a file of another user.
func denied(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fault.Wrap(fault.Usage, err, hintOwner)
	}
	return err
}

// hintOwner is the hint for a cache of another user.
const hintOwner = "run the command as the user that owns the cache folder, or use another folder: --cache FOLDER"

func openFolder(dir string) (*Cache, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	if err := checkFolder(dir); err != nil {
		return nil, err
	}
	// The first of these folders marks dir as a cache, even if this process is killed before it makes the others.
	for _, d := range []string{ownersDir, blobsDir, treesDir, sealsDir, factsDir, tmpDir, workDir, locksDir, usesDir} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, disk(fmt.Errorf("open cache: %w", err))
		}
	}
	// Only one Open runs at a time. Otherwise another Open could count this process as dead, because this process has not
	// locked its owner file yet.
	gate := flock.New(filepath.Join(dir, "open.lock"))
	if err := gate.Lock(); err != nil {
		return nil, disk(fmt.Errorf("open cache %s: lock the folder: %w", dir, err))
	}
	c, err := open(dir)
	return c, errors.Join(err, gate.Close())
}

// checkFolder returns an error if a folder has files and is not a cache. Many programs have folders named blobs, tmp,
// work or logs, so these names do not mark a cache. Hidden files and lost+found belong to the file system or to the
// user's tools.
func checkFolder(dir string) error {
	list, err := os.ReadDir(dir)
	if err != nil {
		if err = ignoreAbsent(err); err != nil {
			err = fmt.Errorf("open cache: %w", err)
		}
		return err
	}
	other := ""
	for _, e := range list {
		switch name := e.Name(); {
		case slices.Contains([]string{ownersDir, treesDir, sealsDir, factsDir, locksDir, usesDir}, name) && e.IsDir():
			return nil
		case name != "lost+found" && !strings.HasPrefix(name, "."):
			other = name
		}
	}
	if other == "" {
		return nil
	}
	return fault.New(fault.Usage,
		fmt.Sprintf("open cache %s: the folder is not a cache, because it has other files, such as %s", dir, other),
		"use a new or empty folder: --cache FOLDER")
}

func open(dir string) (*Cache, error) {
	if err := sweep(dir); err != nil {
		return nil, fmt.Errorf("open cache %s: remove what ended processes left: %w", dir, err)
	}
	f, err := os.CreateTemp(filepath.Join(dir, ownersDir), fmt.Sprintf("%d-*.lock", os.Getpid()))
	if err != nil {
		return nil, disk(fmt.Errorf("open cache: %w", err))
	}
	if err := f.Close(); err != nil {
		return nil, disk(fmt.Errorf("open cache: %w", err))
	}
	c := &Cache{dir: dir, owner: strings.TrimSuffix(filepath.Base(f.Name()), ".lock"), lock: flock.New(f.Name())}
	switch locked, err := c.lock.TryLock(); {
	case err != nil:
		return nil, fmt.Errorf("open cache %s: lock the owner file of this process: %w", dir, err)
	case !locked: // the file is new, so only a process that locks every file can have locked it
		return nil, fault.New(fault.Busy, fmt.Sprintf("open cache %s: another process has locked %s", dir, f.Name()),
			"start the program again")
	}
	for _, d := range []string{c.tmp(), c.work()} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, disk(fmt.Errorf("open cache: %w", err))
		}
	}
	return c, nil
}

// sweep removes the incomplete files of dead owners. An owner is dead if no process has locked its owner file.
func sweep(dir string) error {
	owners, err := os.ReadDir(filepath.Join(dir, ownersDir))
	if err != nil {
		return err
	}
	alive := map[string]bool{}
	var dead []string
	for _, e := range owners {
		file := filepath.Join(dir, ownersDir, e.Name())
		lock := flock.New(file, flock.SetFlag(os.O_RDWR))
		ok, err := lock.TryLock()
		if errors.Is(err, fs.ErrNotExist) {
			continue // the owner closed the cache after ReadDir, and removed its folders before its lock
		}
		if err != nil {
			return err
		}
		if !ok {
			alive[strings.TrimSuffix(e.Name(), ".lock")] = true
			continue
		}
		dead = append(dead, file)
		if err := lock.Close(); err != nil {
			return err
		}
	}
	for _, d := range []string{tmpDir, workDir} {
		entries, err := os.ReadDir(filepath.Join(dir, d))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if alive[e.Name()] {
				continue
			}
			if err := os.RemoveAll(filepath.Join(dir, d, e.Name())); err != nil {
				return err
			}
		}
	}
	// Remove the owner files last. If this process is killed before that, the next sweep removes the rest.
	for _, file := range dead {
		// An owner that closed the cache after ReadDir has removed its file itself.
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
