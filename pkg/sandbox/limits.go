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

// Limits are the limits on the resources of one program and all processes that it starts.
type Limits struct {
	// Memory is the maximum memory in bytes, including /tmp; 0 means the value of Together. Without a control group (see
	// [SupportedLimits]), the limit applies to each process.
	Memory int64
	// Together is the maximum memory in bytes of all simultaneous runs of this process with the same value of Together. 0
	// means seven eighths of [AvailableMemory]. Without a control group, this limit does not apply.
	Together int64
	// Processes is the maximum number of processes and threads; 0 means 16384. Without a control group, all processes of
	// this user count, and root has no limit.
	Processes int
	// Disk is how many bytes the writable binds may grow by; 0 means 16 GiB. Run measures the binds every few seconds.
	Disk int64
	// MinFree is how many bytes must stay free on the disks of the writable binds; 0 means 128 MiB.
	MinFree int64
	// Time is how long the program may run; 0 means two hours.
	Time time.Duration
}

// Usage is what a program used.
type Usage struct {
	// PeakMemory is the maximum memory use in bytes. 0 means unknown: there is no control group, or the kernel is older
	// than 5.19.
	PeakMemory int64
	// Disk is how many bytes the writable binds grew by, at the last measurement.
	Disk int64
}

const (
	maxOutput    = 256 << 20
	maxFile      = 4 << 30 // the largest object files have about 100 MB
	maxProcesses = 16384
	maxDisk      = 16 << 30 // a build of the largest driver with debug information writes 1 GiB
	minFree      = 128 << 20
	maxTmp       = 4 << 30 // /tmp is in memory
	maxTime      = 2 * time.Hour
)

// prlimit is the program that sets the limits inside the sandbox. If the builder set the limits of the running program
// from outside, the program could start other processes first.
const prlimit = "/usr/bin/prlimit"

const (
	hintMemory    = "give the builder more memory (1 GiB for each job), or run fewer jobs (--jobs)"
	hintTogether  = "run fewer builds or jobs side by side (--parallel, --jobs), or give the builder more memory"
	hintDisk      = "free space on the disk of the cache folder, or use another folder: --cache FOLDER"
	hintProcesses = "run fewer jobs (--jobs); if one job starts that many processes, read the end of the build's log"
	hintTime      = "allow more time for a compile (--compile-timeout), or run more jobs (--jobs) on a machine with " +
		"more processors"
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

// AvailableMemory returns the memory in bytes that this process may use: the machine's, or less in a control group with
// a limit.
func AvailableMemory() int64 {
	var info unix.Sysinfo_t
	most := int64(4 << 30) // used if the kernel does not report the memory
	if err := unix.Sysinfo(&info); err == nil {
		most = int64(info.Totalram) * int64(info.Unit)
	}
	if own, err := ownGroup(); err == nil {
		most = min(most, groupMemory(own))
	}
	return most
}

// command returns the command that runs a program within the limits, and within this process's own limits. perProcess
// adds a limit on the memory of each process, for machines without a control group.
func (l Limits) command(perProcess bool) ([]string, error) {
	args := []string{prlimit, "--core=0"}
	rows := []struct {
		flag     string
		resource int
		most     uint64
	}{
		{"--fsize", unix.RLIMIT_FSIZE, uint64(min(maxFile, l.Disk))},
		{"--nproc", unix.RLIMIT_NPROC, uint64(l.Processes)},
	}
	if perProcess {
		// RLIMIT_AS would limit address space, of which compilers map far more than they use.
		rows = append(rows, struct {
			flag     string
			resource int
			most     uint64
		}{"--data", unix.RLIMIT_DATA, uint64(l.Memory)})
	}
	for _, row := range rows {
		var own unix.Rlimit
		if err := unix.Getrlimit(row.resource, &own); err != nil {
			return nil, fmt.Errorf("read the limits of this process: %w", err)
		}
		args = append(args, fmt.Sprintf("%s=%d", row.flag, min(row.most, own.Max)))
	}
	return args, nil
}

// diskWatch watches the disk space of the writable binds. A quota would need root.
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

// checkFree returns an error if a disk is nearly full.
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

// measure returns the total size of the files in the folders. It skips a file that it cannot read, because checkFree
// still checks the free space.
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

// run calls stop when the limit Disk or MinFree is exceeded, and ends when ctx ends. The measurements take at most a
// hundredth of the time.
func (w *diskWatch) run(ctx context.Context, stop context.CancelCauseFunc) {
	if len(w.folders) == 0 {
		return
	}
	// Some bytes that the program writes during this first measurement do not count.
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
			stop(fault.New(fault.DiskFull, fmt.Sprintf("the build wrote more than %d MiB into its folders", w.limits.Disk>>20),
				"read the end of the build's log to see which files it wrote"))
			return
		}
		pause.Reset(max(time.Second, 100*time.Since(start)))
	}
}
