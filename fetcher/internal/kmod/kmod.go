// Package kmod loads and unloads kernel modules by system calls. The kernel gets a module's verified bytes from memory.
// Each refusal becomes a fault with lines of the kernel log. The package searches for no modules, resolves no
// dependencies, and forces nothing.
package kmod

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
)

// System is the kernel's interface for modules and the kernel log. [Linux] is the only real implementation.
type System interface {
	// InitModule calls init_module(2).
	InitModule(image []byte, params string) error
	// DeleteModule calls delete_module(2) with O_NONBLOCK, so that it never waits.
	DeleteModule(name string) error
	// Log returns the lines that the kernel log still has.
	Log() ([]string, error)
}

// Linux is the running kernel.
type Linux struct{}

// InitModule implements [System].
func (Linux) InitModule(image []byte, params string) error { return unix.InitModule(image, params) }

// DeleteModule implements [System].
func (Linux) DeleteModule(name string) error { return unix.DeleteModule(name, unix.O_NONBLOCK) }

// Log implements [System] with syslog(2), which leaves the lines in the kernel log.
func (Linux) Log() ([]string, error) {
	// syslog(2): 3 is SYSLOG_ACTION_READ_ALL, 10 is SYSLOG_ACTION_SIZE_BUFFER.
	size, err := unix.Klogctl(10, nil)
	if err != nil {
		return nil, fmt.Errorf("read the size of the kernel log: %w", err)
	}
	buf := make([]byte, size)
	n, err := unix.Klogctl(3, buf)
	if err != nil {
		return nil, fmt.Errorf("read kernel log: %w", err)
	}
	return strings.Split(strings.TrimRight(string(buf[:n]), "\n"), "\n"), nil
}

// Image is one module to load.
type Image struct {
	// Name is the module's name. Hyphen and underscore count as equal.
	Name string
	// Version is the version in the module's .modinfo section, or "".
	Version string
	// Params is the parameter string, such as "NVreg_Foo=1".
	Params string
	// Bytes returns the verified file.
	Bytes func() ([]byte, error)
	// Optional means that the driver works without this module.
	Optional bool
}

// Outcome is the result for one image.
type Outcome struct {
	Name string `json:"name"`
	// Was is "loaded", "already loaded" or "skipped".
	Was string `json:"was"`
	// Reason says why an optional module was skipped.
	Reason string `json:"reason,omitempty"`
}

// These are the values of [Outcome].Was.
const (
	Loaded  = "loaded"
	Already = "already loaded"
	Skipped = "skipped"
)

// Loader loads and unloads modules of one node.
type Loader struct {
	System System
	// Root is the node's root folder, with /proc and /sys.
	Root fs.FS
}

// Load loads images in order and skips modules that are loaded in the same version. Another loaded version is an error
// of kind Busy. On an error, Load unloads the modules that it loaded.
func (l *Loader) Load(ctx context.Context, images []Image) (done []Outcome, err error) {
	var mine []string
	defer func() {
		if err != nil && len(mine) > 0 {
			slices.Reverse(mine)
			_, undo := l.Unload(context.WithoutCancel(ctx), mine)
			err = errors.Join(err, undo)
		}
	}()
	for _, img := range images {
		if ctx.Err() != nil {
			return done, context.Cause(ctx)
		}
		same, err := l.isLoaded(img)
		if err != nil {
			return done, err
		}
		if same {
			done = append(done, Outcome{Name: img.Name, Was: Already})
			continue
		}
		image, err := img.Bytes()
		if err != nil {
			return done, err // bytes that do not verify are an error, even those of an optional module
		}
		was, err := l.loadOne(img, image)
		switch {
		case err == nil:
			done = append(done, Outcome{Name: img.Name, Was: was})
			if was == Loaded { // after an error, unload only what this program loaded
				mine = append(mine, img.Name)
			}
		case img.Optional:
			done = append(done, Outcome{Name: img.Name, Was: Skipped, Reason: err.Error()})
		default:
			return done, err
		}
	}
	return done, nil
}

// isLoaded reports whether the module is loaded in the same version.
func (l *Loader) isLoaded(img Image) (bool, error) {
	mods, err := host.LoadedModules(l.Root)
	if err != nil {
		return false, err
	}
	for _, m := range mods {
		if m.Name != modinfo.Canonical(img.Name) {
			continue
		}
		if m.Version != img.Version {
			return false, fault.New(fault.Busy,
				fmt.Sprintf("load module %s in version %s: it is already loaded in version %s", img.Name, img.Version,
					orUnknown(m.Version)),
				"stop the programs that use the GPU, then run fetcher again, or reboot the node")
		}
		return true, nil
	}
	return false, nil
}

// loadOne loads one module. It returns [Loaded], or [Already] if another process loaded it first.
func (l *Loader) loadOne(img Image, image []byte) (was string, err error) {
	mark := l.Mark()
	err = l.System.InitModule(image, img.Params)
	if errors.Is(err, syscall.EEXIST) {
		// The module of another process must have the same version.
		same, lookErr := l.isLoaded(img)
		if lookErr != nil {
			return "", lookErr
		}
		if same {
			return Already, nil
		}
	}
	if err == nil {
		return Loaded, nil
	}
	kind, hint := classify(err)
	text := fmt.Sprintf("load module %s: %s", img.Name, explain(err))
	if lines := l.Since(mark); len(lines) > 0 {
		text += "; the kernel says: " + strings.Join(tail(lines, 4), " | ")
	}
	return "", &fault.Error{Kind: kind, Hint: hint, Err: &refusal{text: text, cause: err}}
}

// refusal is the kernel's refusal of a module. It unwraps to the errno.
type refusal struct {
	text  string
	cause error
}

func (r *refusal) Error() string { return r.text }
func (r *refusal) Unwrap() error { return r.cause }

// refusals maps the errnos of init_module(2), delete_module(2) and the module loader to faults.
var refusals = []struct {
	errno syscall.Errno
	kind  fault.Kind
	text  string
	hint  string
}{
	{unix.ENODEV, fault.NoDevice, "the driver found no device that it can use (ENODEV)",
		"check that a GPU is attached to this machine: lspci -d 10de:"},
	{unix.ENOEXEC, fault.Rejected, "the module does not fit this kernel (ENOEXEC)",
		"build and publish the driver for the COS build of this node: builder build"},
	{unix.ENOENT, fault.Rejected, "the kernel lacks a symbol that the module needs (ENOENT)",
		"build and publish the driver for the COS build of this node: builder build"},
	{unix.EINVAL, fault.Rejected, "the kernel refused the module or one of its parameters (EINVAL)",
		"check --module-param, and that the driver was built for the COS build of this node"},
	{unix.EKEYREJECTED, fault.Rejected, "the kernel refused the module's signature (EKEYREJECTED)",
		"boot the node with module.sig_enforce=0 on the kernel command line"},
	{unix.ENOKEY, fault.Rejected, "the kernel has no key for the module's signature (ENOKEY)",
		"boot the node with module.sig_enforce=0 on the kernel command line"},
	{unix.EBADMSG, fault.Rejected, "the module's signature is malformed (EBADMSG)",
		"fetch the driver again: fetcher install"},
	{unix.EPERM, fault.Rejected, "the kernel does not permit the operation (EPERM)",
		"run as root with CAP_SYS_MODULE (privileged: true), and check loadpin and lockdown on the kernel command line"},
	{unix.EACCES, fault.Rejected, "a security module denied the operation (EACCES)",
		"run as root with CAP_SYS_MODULE (privileged: true)"},
	{unix.EBUSY, fault.Busy, "the module is in use (EBUSY)", "stop the programs that use the GPU, then run fetcher again"},
	{unix.EAGAIN, fault.Busy, "the module is in use (EAGAIN)",
		"stop the programs that use the GPU, then run fetcher again"},
	{unix.EEXIST, fault.Busy, "another version of the module is loaded (EEXIST)",
		"stop the programs that use the GPU, then run fetcher again, or reboot the node"},
	{unix.ENOMEM, fault.Transient, "the node has too little memory (ENOMEM)",
		"stop programs on the node to get memory, then run fetcher again"},
	{unix.EIO, fault.Unusable, "the driver could not talk to the device (EIO)",
		"read the kernel log: dmesg | grep NVRM"},
}

func classify(err error) (fault.Kind, string) {
	for _, r := range refusals {
		if errors.Is(err, r.errno) {
			return r.kind, r.hint
		}
	}
	return fault.Rejected, "read the kernel log: dmesg | tail"
}

func explain(err error) string {
	for _, r := range refusals {
		if errors.Is(err, r.errno) {
			return r.text
		}
	}
	return err.Error()
}

// Unload unloads modules in order and returns the unloaded ones. It skips modules that are not loaded. At a module in
// use, it stops with an error of kind Busy.
func (l *Loader) Unload(ctx context.Context, names []string) (done []string, err error) {
	for _, name := range names {
		if ctx.Err() != nil {
			return done, context.Cause(ctx)
		}
		err := l.System.DeleteModule(modinfo.Canonical(name))
		if errors.Is(err, syscall.ENOENT) {
			continue
		}
		if err != nil {
			kind, hint := classify(err)
			return done, &fault.Error{Kind: kind, Hint: hint,
				Err: &refusal{text: fmt.Sprintf("unload module %s: %s", name, explain(err)), cause: err}}
		}
		done = append(done, name)
	}
	return done, nil
}

// Mark is a position in the kernel log of one boot. The zero value is no position.
type Mark struct {
	// Last is the last line before the position.
	Last string `json:"last"`
}

// Mark returns the end of the kernel log, for [Loader.Since].
func (l *Loader) Mark() Mark {
	lines, err := l.System.Log()
	if err != nil || len(lines) == 0 {
		return Mark{} // without a log, Since has nothing to quote either
	}
	return Mark{Last: lines[len(lines)-1]}
}

// Since returns the kernel's lines after the mark, without their priority prefix. If the mark is lost, it returns all
// lines.
func (l *Loader) Since(m Mark) []string {
	lines, err := l.System.Log()
	if err != nil {
		return nil // the log is optional: a missing log must not hide the error
	}
	if m.Last != "" {
		for i := len(lines) - 1; i >= 0; i-- {
			if lines[i] == m.Last {
				lines = lines[i+1:]
				break
			}
		}
	}
	var plain []string
	for _, line := range lines {
		if line = stripPrefix(line); line != "" {
			plain = append(plain, line)
		}
	}
	return plain
}

// Follow returns the kernel's lines after the mark, and the present end of the log. If the mark is empty, it returns no
// lines. If the mark is lost, it returns all lines: the log drops the oldest lines first.
func (l *Loader) Follow(m Mark) (lines []string, end Mark) {
	all, err := l.System.Log()
	if err != nil || len(all) == 0 {
		return nil, m
	}
	end = Mark{Last: all[len(all)-1]}
	if m == (Mark{}) {
		return nil, end
	}
	for _, line := range all[lastIndex(all, m.Last)+1:] {
		if line = stripPrefix(line); line != "" {
			lines = append(lines, line)
		}
	}
	return lines, end
}

// lastIndex returns the index of the last line that equals s; -1 means that there is none.
func lastIndex(all []string, s string) int {
	for i, line := range slices.Backward(all) {
		if line == s {
			return i
		}
	}
	return -1
}

// NVRM returns the NVIDIA driver's own lines, at most the last n.
func NVRM(lines []string, n int) []string {
	var found []string
	for _, line := range lines {
		if _, text, ok := strings.Cut(line, "NVRM"); ok {
			found = append(found, "NVRM"+text)
		}
	}
	return tail(found, n)
}

// stripPrefix removes "<6>" and "[   12.345678] " from the beginning of a line.
func stripPrefix(line string) string {
	if strings.HasPrefix(line, "<") {
		if _, rest, ok := strings.Cut(line, ">"); ok {
			line = rest
		}
	}
	if strings.HasPrefix(line, "[") {
		if _, rest, ok := strings.Cut(line, "]"); ok {
			line = rest
		}
	}
	return strings.TrimSpace(line)
}

func tail(lines []string, n int) []string { return lines[max(0, len(lines)-n):] }

func orUnknown(s string) string {
	if s == "" {
		return "(unknown)"
	}
	return s
}
