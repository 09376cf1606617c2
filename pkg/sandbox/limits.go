package sandbox

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// Limits bound what one program and all that it starts may take together, so
// that one that runs wild fails by itself and not the machine.
type Limits struct {
	// Memory in bytes, /tmp among it; 0 means as much as Together. Where there is no
	// control group (see [SupportedLimits]) it bounds each process instead of all together.
	Memory int64
	// Together bounds the memory of all runs that this process has at one time, in
	// bytes; 0 means seven eighths of what this process may have. It holds where there
	// is a control group, for all runs that give the same number.
	Together int64
	// Processes, threads too; 0 means 16384. Where there is no control group, it
	// counts all processes of this user, and root's not at all.
	Processes int
	// Disk is how many bytes the writable binds may grow by; 0 means 16 GiB. They
	// are measured every few seconds.
	Disk int64
	// MinFree is how many bytes have to stay free on the disks of the writable
	// binds; 0 means 128 MiB.
	MinFree int64
	// Time is how long the program may run; 0 means two hours.
	Time time.Duration
}

// Usage is what a program took.
type Usage struct {
	// PeakMemory is the most memory at any one time, in bytes; 0 where nobody
	// counted: there was no control group, or the kernel is older than 5.19.
	PeakMemory int64
	// Disk is how many bytes the writable binds grew by, as last measured.
	Disk int64
}

const (
	maxOutput    = 256 << 20
	maxFile      = 4 << 30 // the largest object files have some 100 MB
	maxProcesses = 16384
	maxDisk      = 16 << 30 // a build of the largest driver with debug information writes 1 GiB
	minFree      = 128 << 20
	maxTmp       = 4 << 30 // /tmp is memory
	maxTime      = 2 * time.Hour
)

// prlimit sets the limits from inside: by the time that this process could set
// them, the program may have started others.
const prlimit = "/usr/bin/prlimit"

const (
	hintMemory    = "give the builder more memory (1 GiB for each job), or run fewer jobs"
	hintTogether  = "run fewer builds or jobs side by side (--parallel, --jobs), or give the builder more memory"
	hintDisk      = "free space on the disk of the cache folder, or choose another folder: --cache"
	hintProcesses = "run fewer jobs; if one job alone does this, read the end of the build's log"
	hintTime      = "allow more time, or more jobs on a machine with more processors"
)

func (l Limits) withDefaults() Limits {
	if l.Together <= 0 {
		l.Together = AvailableMemory() / 8 * 7
	}
	if l.Memory <= 0 {
		l.Memory = l.Together
	}
	if l.Processes <= 0 {
		l.Processes = maxProcesses
	}
	if l.Disk <= 0 {
		l.Disk = maxDisk
	}
	if l.MinFree <= 0 {
		l.MinFree = minFree
	}
	if l.Time <= 0 {
		l.Time = maxTime
	}
	return l
}

// AvailableMemory is what this process may have: the machine's, or less where
// a control group says so.
func AvailableMemory() int64 {
	var info unix.Sysinfo_t
	most := int64(4 << 30) // for a kernel that does not say
	if err := unix.Sysinfo(&info); err == nil {
		most = int64(info.Totalram) * int64(info.Unit)
	}
	if own, err := ownGroup(); err == nil {
		most = min(most, groupMemory(own))
	}
	return most
}

// command returns the program that runs another one within the limits, or those of
// this process where they are narrower. each says that memory is bounded for
// each process, without a control group.
func (l Limits) command(each bool) ([]string, error) {
	args := []string{prlimit, "--core=0"}
	rows := []struct {
		flag     string
		resource int
		most     uint64
	}{
		{"--fsize", unix.RLIMIT_FSIZE, uint64(min(maxFile, l.Disk))},
		{"--nproc", unix.RLIMIT_NPROC, uint64(l.Processes)},
	}
	if each {
		// Private memory, not address space: compilers map far more than they use.
		rows = append(rows, struct {
			flag     string
			resource int
			most     uint64
		}{"--data", unix.RLIMIT_DATA, uint64(l.Memory)})
	}
	for _, row := range rows {
		var own unix.Rlimit
		if err := unix.Getrlimit(row.resource, &own); err != nil {
			return nil, fmt.Errorf("read own limits: %w", err)
		}
		args = append(args, fmt.Sprintf("%s=%d", row.flag, min(row.most, own.Max)))
	}
	return args, nil
}

// diskWatch looks after the disk space of the writable binds. A quota would be
// firmer, but takes root and a file system that has one; RLIMIT_FSIZE bounds
// single files only.
type diskWatch struct {
	limits  Limits
	folders []string
	grown   int64
}

func newDiskWatch(l Limits, binds []Bind) (*diskWatch, error) {
	w := &diskWatch{limits: l}
	for _, b := range binds {
		if info, err := os.Stat(b.Host); err == nil && info.IsDir() && b.Writable {
			w.folders = append(w.folders, b.Host)
		}
	}
	return w, w.checkFree()
}

// checkFree reports a disk that is nearly full.
func (w *diskWatch) checkFree() error {
	for _, dir := range w.folders {
		var s unix.Statfs_t
		if err := unix.Statfs(dir, &s); err != nil {
			return fmt.Errorf("read free space of %s: %w", dir, err)
		}
		if free := int64(s.Bavail) * s.Bsize; free < w.limits.MinFree {
			return fault.New(fault.DiskFull,
				fmt.Sprintf("the disk of %s has %d MiB left; want at least %d MiB", dir, free>>20, w.limits.MinFree>>20), hintDisk)
		}
	}
	return nil
}

// measure adds up the sizes of the files in the folders. A file that disappears meanwhile,
// or that cannot be read, does not count: checkFree looks at the disk's free space.
func (w *diskWatch) measure(ctx context.Context) (bytes int64) {
	for _, dir := range w.folders {
		_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
			if ctx.Err() != nil {
				return filepath.SkipAll
			}
			if err != nil || d.IsDir() {
				return nil //nolint:nilerr // see above
			}
			if info, err := d.Info(); err == nil {
				if s, ok := info.Sys().(*syscall.Stat_t); ok {
					bytes += s.Blocks * 512
				}
			}
			return nil
		})
	}
	return bytes
}

// run calls stop once a bound is passed, and ends with ctx. It spends at most a
// hundredth of its time looking.
func (w *diskWatch) run(ctx context.Context, stop context.CancelCauseFunc) {
	if len(w.folders) == 0 {
		return
	}
	// Beside the program's start, which need not wait for it: what it writes in
	// that moment may count as having been there.
	began := w.measure(ctx)
	pause := time.NewTimer(time.Second)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
		}
		if err := w.checkFree(); err != nil {
			stop(err)
			return
		}
		start := time.Now()
		now := w.measure(ctx)
		if ctx.Err() != nil {
			return
		}
		if w.grown = now - began; w.grown > w.limits.Disk {
			stop(fault.New(fault.DiskFull, fmt.Sprintf("it wrote more than %d MiB into its folders", w.limits.Disk>>20),
				"read the end of the build's log for what it was writing"))
			return
		}
		pause.Reset(max(time.Second, 100*time.Since(start)))
	}
}
