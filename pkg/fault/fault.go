// Package fault is the closed list of the ways in which Prebake fails. Each kind has an exit code, an HTTP status, a
// retry rule and a metric label.
//
// The lowest layer that knows the remedy attaches the kind and a hint. Layers above it wrap the error with %w, and
// decide by its kind ([Of]), never by its text.
//
// The package imports no other package of the project.
package fault

import (
	"context"
	"errors"
	"fmt"
	"syscall"
)

// Kind is one way to fail. The zero value is Internal: an unclassified error counts as a bug.
type Kind int

// The closed list of kinds. A new kind needs a row in the table below.
const (
	Internal       Kind = iota // a bug, or a machine that does not work
	Usage                      // the caller's input is wrong: flag, argument, file format
	NoArtifact                 // nothing is published for this kernel, driver and flavour
	Unverified                 // bytes whose digest, signature or provenance is not valid
	Mismatch                   // verified bytes that are meant for another kernel, driver or flavour
	Rejected                   // the kernel refused a module
	Busy                       // a lock is held, or a loaded module is in use
	NoDevice                   // no NVIDIA GPU on this machine
	Unusable                   // a GPU is present, but the driver cannot use it
	Transient                  // a network or a service did not work; the same call may succeed later
	NotFound                   // the named thing does not exist
	Unauthorized               // the caller is not identified
	Forbidden                  // the caller is identified and has no permission
	TooLarge                   // the request, or the thing that it asks for, exceeds a size limit
	TooMany                    // the caller asks too often
	Pending                    // the artifact is not published yet, but it is queued or being built
	WebPage                    // a login page or a proxy's page answered in place of a service
	InputMissing               // an input that the build needs does not exist
	Checksum                   // a fetched input does not match its checksum
	Unsupported                // this driver is not made for this kernel or flavour
	APIBreak                   // the driver's source does not compile against this kernel
	CheckFailed                // the driver compiled, but one of its modules does not fit the kernel
	LoadTestFailed             // the modules fit the kernel, but one does not load in the virtual machine
	OutOfMemory                // the build needs more memory than it may have
	DiskFull                   // no space is left on a disk
	TimedOut                   // the operation exceeded its time limit
	PublishRefused             // the destination holds other bytes under this name, or refuses the upload
	Cancelled                  // a person or a program cancelled the operation
	Several                    // several operations failed, for different reasons
	kinds                      // number of kinds, not a kind
)

type row struct {
	name  string // metric label, API class, and text form
	exit  int    // process exit status, stable across releases
	http  int    // status of an API response
	retry bool   // may the same call succeed later without a change?
	what  string // one line for the table of exit codes in the documentation
}

// Exit codes 0 to 2 have their usual meanings; the shell uses the codes from 126 on. The code of a kind never changes,
// and no other kind ever gets it.
var table = [kinds]row{
	Internal:       {"internal", 1, 500, false, "internal error: a bug, or a broken machine"},
	Usage:          {"usage", 2, 400, false, "wrong flag, argument or configuration"},
	NoArtifact:     {"no-artifact", 3, 404, true, "nothing is published for this kernel, driver and flavour"},
	Unverified:     {"unverified", 4, 422, false, "a digest, signature or provenance is not valid"},
	Mismatch:       {"mismatch", 5, 409, false, "the artifact is verified, but is for another kernel, driver or flavour"},
	Rejected:       {"rejected", 6, 422, false, "the kernel refused a module"},
	Busy:           {"busy", 7, 409, true, "a lock is held, or modules are in use"},
	NoDevice:       {"no-device", 8, 404, false, "no GPU present"},
	Unusable:       {"unusable", 9, 422, false, "GPU present but not usable"},
	Transient:      {"transient", 10, 503, true, "an error of the network or a service, which may pass"},
	NotFound:       {"not-found", 11, 404, false, "the requested object does not exist"},
	Unauthorized:   {"unauthorized", 12, 401, false, "no token, or a token that is no longer valid"},
	Forbidden:      {"forbidden", 13, 403, false, "the token does not allow this"},
	TooLarge:       {"too-large", 14, 413, false, "the request or its response is larger than the limit"},
	TooMany:        {"too-many", 15, 429, true, "too many requests"},
	Pending:        {"pending", 16, 404, true, "not published yet: it is queued, or being built"},
	WebPage:        {"web-page", 17, 502, true, "the address answered with a web page, such as a login page"},
	InputMissing:   {"input-missing", 20, 404, false, "a build input does not exist"},
	Checksum:       {"checksum-mismatch", 21, 422, false, "a build input does not match its checksum"},
	Unsupported:    {"unsupported", 22, 422, false, "this driver is not made for this kernel or flavour"},
	APIBreak:       {"api-break", 23, 422, false, "the driver does not compile against this kernel"},
	CheckFailed:    {"check-failed", 24, 422, false, "a compiled module would not fit the kernel"},
	LoadTestFailed: {"load-test-failed", 25, 422, false, "a module does not load in the test machine"},
	OutOfMemory:    {"out-of-memory", 26, 507, true, "the build ran out of memory"},
	DiskFull:       {"disk-full", 27, 507, true, "no space left on a disk"},
	TimedOut:       {"timed-out", 28, 504, true, "the time limit was exceeded"},
	PublishRefused: {"publish-refused", 29, 409, false, "the destination refused, or has other bytes under this name"},
	Cancelled:      {"cancelled", 30, 499, true, "stopped on request"},
	Several:        {"several", 31, 422, false, "several builds failed, not all in the same way"},
}

func (k Kind) row() row {
	if k < 0 || k >= kinds {
		return table[Internal]
	}
	return table[k]
}

// String returns the stable name that metrics, the API and logs use.
func (k Kind) String() string { return k.row().name }

// ExitCode returns the process exit status for an error of this kind.
func (k Kind) ExitCode() int { return k.row().exit }

// HTTPStatus returns the status of an API response with an error of this kind.
func (k Kind) HTTPStatus() int { return k.row().http }

// Retryable reports whether the same call, without any change, may succeed later.
func (k Kind) Retryable() bool { return k.row().retry }

// Passes reports whether a build that failed with this kind may succeed hours later: the network, a machine or a
// missing input may have caused the failure. Passes also returns true for kinds for which a retry at once is useless.
func (k Kind) Passes() bool {
	switch k {
	case Transient, TimedOut, DiskFull, OutOfMemory, Busy, TooMany, WebPage, InputMissing, Internal:
		return true
	}
	return false
}

// What returns one sentence about the kind, for the documentation.
func (k Kind) What() string { return k.row().what }

// Kinds returns all kinds in the order of their exit codes.
func Kinds() []Kind {
	all := make([]Kind, 0, kinds)
	for k := range kinds {
		all = append(all, k)
	}
	return all
}

// Parse returns the kind with the given name, as [Kind.String] prints it.
func Parse(name string) (Kind, error) {
	for k := range kinds {
		if table[k].name == name {
			return k, nil
		}
	}
	return Internal, fmt.Errorf("there is no fault kind %q", name)
}

// MarshalText returns the kind's stable name (see [Kind.String]).
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText sets the kind whose stable name the text is.
func (k *Kind) UnmarshalText(text []byte) error {
	parsed, err := Parse(string(text))
	if err != nil {
		return err
	}
	*k = parsed
	return nil
}

// Error is an error with a kind and an optional hint.
type Error struct {
	Kind Kind
	// Hint tells the reader what to do next, and names the exact command or setting; "" means no hint.
	Hint string
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// New returns an error of this kind. The hint tells the reader what to do next; "" means no hint.
func New(kind Kind, text, hint string) error {
	return &Error{Kind: kind, Hint: hint, Err: errors.New(text)}
}

// Wrap adds a kind and a hint to err. A nil err stays nil.
func Wrap(kind Kind, err error, hint string) error {
	if err == nil {
		return nil
	}
	return &Error{Kind: kind, Hint: hint, Err: err}
}

// Errorf returns an error of this kind with a formatted text and no hint. The format may contain %w.
func Errorf(kind Kind, format string, args ...any) error {
	return &Error{Kind: kind, Err: fmt.Errorf(format, args...)}
}

// Join joins errors as [errors.Join] does, but in one line, with "; " between them.
func Join(errs ...error) error {
	var all error
	for _, err := range errs {
		switch {
		case all == nil:
			all = err
		case err != nil:
			all = fmt.Errorf("%w; %w", all, err)
		}
	}
	return all
}

// Of returns the kind of the outermost classified error in err's chain. If the chain has no classified error, Of
// returns Cancelled for a cancelled context, TimedOut for an expired context, and Internal for anything else.
func Of(err error) Kind {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e.Kind
	case errors.Is(err, context.Canceled):
		return Cancelled
	case errors.Is(err, context.DeadlineExceeded):
		return TimedOut
	}
	return Internal
}

// Hint returns the first non-empty hint in err's chain, from the outermost error inwards.
func Hint(err error) string {
	for err != nil {
		var e *Error
		if !errors.As(err, &e) {
			return ""
		}
		if e.Hint != "" {
			return e.Hint
		}
		err = e.Err
	}
	return ""
}

// NoSpace reports whether err says that a disk is full, or that the caller's quota is used up.
func NoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// Disk adds the kind DiskFull and the hint to the error of a full disk. It returns any other error unchanged.
func Disk(err error, hint string) error {
	if !NoSpace(err) {
		return err
	}
	return Wrap(DiskFull, err, hint)
}

// CacheDisk works as Disk does, for files in the cache folder.
func CacheDisk(err error) error {
	return Disk(err, "free space on the disk of the cache folder, or name another folder with --cache")
}

// TempDisk works as Disk does, for files in the folder for temporary files.
func TempDisk(err error) error {
	return Disk(err, "free space in the folder for temporary files, or name another folder with TMPDIR")
}

// Is reports whether err is of this kind.
func Is(err error, kind Kind) bool { return err != nil && Of(err) == kind }
