package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// Names of control groups (version 2). Each run gets its own group, and the sandbox starts inside it. All these groups
// are in one parent group, which limits the memory of all runs together.
const (
	groupRoot = "/sys/fs/cgroup"
	// selfGroup is the group into which the builder itself moves. A group that delegates controllers must have no
	// processes.
	selfGroup = "prebake-builder"
	allGroup  = "prebake-all-" // followed by a process id, a dash and the bound in MiB
	runGroup  = "prebake-run-" // followed by a process id, a dash and random characters
)

const hintGroup = "in Kubernetes, set the memory limit of the pod; in a systemd unit, set Delegate=yes; " +
	"elsewhere, give the builder a control group of its own: systemd-run --user --scope -p Delegate=yes builder …"

// LimitSupport says how this machine enforces the limits on memory and processes.
type LimitSupport struct {
	// ControlGroup is true if a control group enforces the limits for all processes together. If it is false, Reason says
	// why, with a hint. Without a control group, memory is limited for each process, and root may start any number of
	// processes.
	ControlGroup bool
	Reason       error
}

// SupportedLimits tests how this machine enforces the limits.
func SupportedLimits() LimitSupport {
	g, err := newGroup(Limits{}.withDefaults())
	if err == nil {
		err = g.close()
	}
	if err != nil && fault.Hint(err) == "" {
		err = fault.Wrap(fault.Unsupported, err, hintGroup)
	}
	return LimitSupport{ControlGroup: err == nil, Reason: err}
}

// ownGroup returns the folder of this process's control group.
func ownGroup() (string, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(groupRoot, &s); err != nil {
		return "", fmt.Errorf("find the control groups in %s: %w", groupRoot, err)
	}
	if s.Type != unix.CGROUP2_SUPER_MAGIC {
		return "", fault.New(fault.Unsupported, fmt.Sprintf("%s is not a control group of version 2", groupRoot),
			"boot this machine with systemd.unified_cgroup_hierarchy=1, on kernel 5.7 or newer")
	}
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", fmt.Errorf("find this process's control group: %w", err)
	}
	path, err := parseOwnGroup(string(text))
	return filepath.Join(groupRoot, path), err
}

// parseOwnGroup parses /proc/self/cgroup. The line for version 2 is 0::/path.
func parseOwnGroup(text string) (string, error) {
	for line := range strings.Lines(text) {
		if path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::/"); ok {
			if path != "" && !filepath.IsLocal(path) { // such as /../x, a group outside of the namespace
				return "", fmt.Errorf("find this process's control group: the group /%s is not visible in this container", path)
			}
			return path, nil
		}
	}
	return "", errors.New("find this process's control group: the process has no control group of version 2")
}

// groupMemory returns the lowest memory limit, in bytes, of this group and its ancestors, or math.MaxInt64.
func groupMemory(dir string) int64 {
	least := int64(math.MaxInt64)
	for ; len(dir) >= len(groupRoot); dir = filepath.Dir(dir) {
		text, err := os.ReadFile(filepath.Join(dir, "memory.max"))
		if err != nil {
			continue // the root group has no limit
		}
		if n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil { // the file may also say "max"
			least = min(least, n)
		}
	}
	return least
}

// MemoryLimit returns the lowest memory limit, in bytes, of this process's control group and its ancestors. It returns
// 0 if there is no limit, or if this process cannot see its control group.
func MemoryLimit() int64 {
	least := int64(math.MaxInt64)
	if own, err := ownGroup(); err == nil {
		least = groupMemory(own)
	} else if n := groupCount(memoryGroup1(), "memory.stat", "hierarchical_memory_limit"); n > 0 {
		least = n
	}
	if least >= noLimit1 {
		return 0
	}
	return least
}

// noLimit1 is less than what a control group of version 1 without a limit reports: the largest multiple of the page
// size.
const noLimit1 = 1 << 62

// MemoryKills returns how many processes of this process's control group the kernel has killed for lack of memory. It
// returns 0 if this process cannot see its control group.
func MemoryKills() int64 {
	if own, err := ownGroup(); err == nil {
		return groupCount(own, "memory.events", "oom_kill")
	}
	return groupCount(memoryGroup1(), "memory.oom_control", "oom_kill")
}

// memoryGroup1 returns the folder of this process's memory control group of version 1, or "" if it is not visible. In a
// container, the top of the hierarchy is the container's own group, while /proc has the path on the machine.
func memoryGroup1() string {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) { // such as 4:memory:/path
		_, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		controllers, path, _ := strings.Cut(rest, ":/")
		if !slices.Contains(strings.Split(controllers, ","), "memory") {
			continue
		}
		top := filepath.Join(groupRoot, "memory")
		for _, dir := range []string{path, ""} {
			if _, err := os.Stat(filepath.Join(top, dir, "memory.stat")); err == nil && (dir == "" || filepath.IsLocal(dir)) {
				return filepath.Join(top, dir)
			}
		}
	}
	return ""
}

// parent returns the control group for the groups of the runs, and enables the controllers that they need. A group with
// processes cannot delegate controllers. So parent moves this process into a child group. It returns an error if the
// group has other processes.
func parent() (string, error) {
	own, err := ownGroup()
	if err != nil {
		return "", err
	}
	if filepath.Base(own) == selfGroup {
		return filepath.Dir(own), nil
	}
	return own, delegate(own, os.Getpid())
}

func delegate(dir string, self int) error {
	has := func(file string) (bool, error) {
		text, err := os.ReadFile(filepath.Join(dir, file))
		words := strings.Fields(string(text))
		return slices.Contains(words, "memory") && slices.Contains(words, "pids"), err
	}
	if ok, err := has("cgroup.subtree_control"); ok || err != nil {
		return err
	}
	if ok, err := has("cgroup.controllers"); !ok || err != nil {
		return errors.Join(fmt.Errorf("control group %s does not have the controllers for memory and processes", dir), err)
	}
	enable := func() error { return writeGroup(dir, "cgroup.subtree_control", "+memory +pids") }
	err := enable()
	if !errors.Is(err, unix.EBUSY) {
		return err
	}
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return err
	}
	for _, pid := range strings.Fields(string(text)) {
		if pid != strconv.Itoa(self) {
			return fmt.Errorf("control group %s is shared with other processes", dir)
		}
	}
	leaf := filepath.Join(dir, selfGroup)
	if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := writeGroup(leaf, "cgroup.procs", strconv.Itoa(self)); err != nil {
		return err
	}
	return enable()
}

func writeGroup(dir, file, value string) error {
	// O_CREATE is not set, so a file that the kernel does not have is an error.
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// group is the control group of one run.
type group struct {
	dir  *os.File
	path string
}

func newGroup(l Limits) (*group, error) {
	base, err := parent()
	if err != nil {
		return nil, err
	}
	sweepGroups(base)
	for try := 0; ; try++ {
		all, err := groupOfAll(base, l.Together)
		if err != nil {
			return nil, err
		}
		path, err := os.MkdirTemp(all, fmt.Sprintf("%s%d-*", runGroup, os.Getpid()))
		if errors.Is(err, fs.ErrNotExist) && try < maxTries {
			continue // another run has just ended, and has removed the group for all runs
		} else if err != nil {
			return nil, err
		}
		g := &group{path: path}
		if err = g.set(l); err == nil {
			return g, nil
		}
		cerr := g.close()
		if (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)) && try < maxTries {
			continue // the parent group was removed and created again, and has no controllers yet
		}
		return nil, errors.Join(err, cerr)
	}
}

// maxTries is how often newGroup retries after another run has removed the parent group.
const maxTries = 100

// groupOfAll creates or finds the group for all runs of this process with the same [Limits.Together].
func groupOfAll(base string, most int64) (string, error) {
	path := filepath.Join(base, fmt.Sprintf("%s%d-%d", allGroup, os.Getpid(), most>>20))
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	err := errors.Join(
		writeGroup(path, "memory.max", strconv.FormatInt(most, 10)),
		writeGroup(path, "cgroup.subtree_control", "+memory +pids"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return path, nil // the group is being removed: MkdirTemp fails then, and newGroup retries
	}
	return path, err
}

func (g *group) set(l Limits) (err error) {
	err = errors.Join(
		writeGroup(g.path, "memory.max", strconv.FormatInt(l.Memory, 10)),
		writeGroup(g.path, "memory.oom.group", "1"), // kill all processes of the run, because a partial build is useless
		writeGroup(g.path, "pids.max", strconv.Itoa(l.Processes)))
	if err != nil {
		return err
	}
	// If the run could use swap, it would become very slow instead of ending. A kernel without swap does not have the
	// file.
	if err := writeGroup(g.path, "memory.swap.max", "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	g.dir, err = os.Open(g.path)
	return err
}

// brokenLimit returns an error for the limit that the run exceeded, or nil. It reads the kernel's counters, because the
// exit status does not say who killed a program.
func (g *group) brokenLimit(l Limits) error {
	if n := g.count("memory.events", "oom_kill"); n > 0 {
		// The counter "oom" is for the limits of this group and its children, and not for those of its parents.
		if g.count("memory.events", "oom") == 0 {
			return fault.New(fault.OutOfMemory,
				fmt.Sprintf("the programs that ran at the same time needed more than %d MiB of memory together, "+
					"or the machine had less memory than that", l.Together>>20),
				hintTogether)
		}
		return fault.New(fault.OutOfMemory, fmt.Sprintf("the build needed more than %d MiB of memory", l.Memory>>20),
			hintMemory)
	}
	if n := g.count("pids.events", "max"); n > 0 {
		return fault.New(fault.Internal, fmt.Sprintf("the build had more than %d processes at the same time", l.Processes),
			hintProcesses)
	}
	return nil
}

func (g *group) count(file, key string) int64 { return groupCount(g.path, file, key) }

// groupCount returns the number with this key in a file of a control group in which each line has a key and a number.
// It returns 0 if the file does not exist, or if dir is "".
func groupCount(dir, file, key string) int64 {
	text, err := os.ReadFile(filepath.Join(dir, file))
	if dir == "" || err != nil {
		return 0
	}
	return parseCount(string(text), key)
}

func parseCount(text, key string) int64 {
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == key {
			n, _ := strconv.ParseInt(f[1], 10, 64) // the kernel writes only numbers here
			return n
		}
	}
	return 0
}

func (g *group) peak() int64 {
	text, err := os.ReadFile(filepath.Join(g.path, "memory.peak"))
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64) // the kernel writes only numbers here
	return n
}

// close removes the group, and its parent if this was the last run. It retries for half a second, because the kernel
// may still be removing the last process.
func (g *group) close() error {
	var err error
	if g.dir != nil {
		err = g.dir.Close()
	}
	for range 50 {
		rerr := unix.Rmdir(g.path)
		if !errors.Is(rerr, unix.EBUSY) {
			if errors.Is(rerr, fs.ErrNotExist) {
				rerr = nil // another builder's sweepGroups removed it
			}
			_ = unix.Rmdir(filepath.Dir(g.path)) // fails while another run is in the parent group
			return errors.Join(err, rerr)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err // the next builder's sweepGroups removes the group
}

// sweepGroups removes empty groups that killed builders left behind.
func sweepGroups(base string) {
	left, err := filepath.Glob(filepath.Join(base, allGroup+"*"))
	if err != nil {
		return // cannot happen: the pattern is constant
	}
	for _, path := range left {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(path), allGroup), "-")
		n, err := strconv.Atoi(pid)
		if err != nil || n == os.Getpid() || !errors.Is(unix.Kill(n, 0), unix.ESRCH) {
			continue
		}
		runs, err := filepath.Glob(filepath.Join(path, runGroup+"*"))
		if err != nil {
			return // cannot happen: the pattern is constant
		}
		for _, dir := range append(runs, path) {
			// The process id may belong to a builder in another container. So remove only groups older than a minute.
			if info, err := os.Stat(dir); err == nil && time.Since(info.ModTime()) > time.Minute {
				_ = unix.Rmdir(dir) // fails while a process is in the group
			}
		}
	}
}
