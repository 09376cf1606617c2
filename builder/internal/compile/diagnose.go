package compile

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
)

// findings has the first line of each kind of error in a build's output.
type findings struct {
	source  string // a compiler error with a place in a source file
	modpost string // modpost's first ERROR
	check   string // the name of NVIDIA's sanity check that failed
	missing string // a program that was not found
	library string // the loader's message about a program whose library is missing on this machine
	memory  string // a message about missing memory or a killed program
	disk    string // a message about a full disk
	make    string // `make`'s first *** line
	// unanswered is true if `make` called conftest.sh for a test that has no stored result.
	unanswered bool
	lastLine   string // the last line before `make`'s error that is neither a step nor a message of `make`
}

var (
	// gcc and clang print an error in this format: file:line:column: error: text
	sourceError  = regexp.MustCompile(`^([^\s:]+\.[chS]):(\d+):(?:\d+:)? (?:fatal )?error: (.*)$`)
	modpostError = regexp.MustCompile(`^ERROR: modpost: (.*)$`)
	makeError    = regexp.MustCompile(`^make(?:\[\d+\])?: \*\*\* (.*)$`)
	makeCheck    = regexp.MustCompile(`: (\w+_sanity_check|cc_version_check)\] Error \d+$`)
	noProgram    = regexp.MustCompile(
		`^(?:/bin/sh|sh|prlimit|make(?:\[\d+\])?): .*(?:not found|No such file or directory)$`)
	// Two messages of glibc's dynamic loader.
	libraryError = regexp.MustCompile("^\\S+: .*: version [`'][A-Z]+_[0-9.]+' not found \\(required by \\S+\\)$|^\\S+: " +
		"error while loading shared libraries: \\S+: cannot open shared object file")
	memoryError = regexp.MustCompile(
		`(?i)Killed signal terminated program|Cannot allocate memory|virtual memory exhausted|out of memory allocating|unable to execute command: Killed|^Killed$|^make(\[\d+\])?: \*\*\* .*\bKilled$`)
)

// unanswered is the start of the message with which this package's conftest.sh reports a test that has no stored
// result.
const unanswered = "prebake: conftest has no answer: "

const diskFullText = "No space left on device"

func (f *findings) read(line string) {
	first := func(to *string, text string) {
		if *to == "" {
			*to = text
		}
	}
	switch {
	case strings.Contains(line, diskFullText):
		first(&f.disk, relative(line))
	case memoryError.MatchString(line):
		first(&f.memory, relative(line))
	}
	if strings.HasPrefix(line, unanswered) {
		f.unanswered = true
	}
	if libraryError.MatchString(line) {
		first(&f.library, relative(line))
	}
	if sourceError.MatchString(line) {
		first(&f.source, relative(line))
	}
	if m := modpostError.FindStringSubmatch(line); m != nil {
		first(&f.modpost, relative(m[1]))
	}
	if noProgram.MatchString(line) {
		first(&f.missing, relative(line))
	}
	if m := makeError.FindStringSubmatch(line); m != nil {
		first(&f.make, relative(m[1]))
		if c := makeCheck.FindStringSubmatch(line); c != nil {
			first(&f.check, c[1])
		}
		return
	}
	if text := strings.TrimSpace(line); f.make == "" && text != "" && !stepLine.MatchString(line) &&
		!strings.HasPrefix(text, "make") {
		f.lastLine = relative(text)
	}
}

// paths shortens the sandbox's paths. A driver's file becomes relative to the driver's sources, and a kernel header
// becomes <kernel>/include/….
var paths = strings.NewReplacer(insideSource+"/", "", insideKernel+"/", "<kernel>/", insideToolchain+"/",
	"<toolchain>/")

func relative(line string) string { return paths.Replace(line) }

const (
	hintDisk   = "free at least 1 GiB on the disk of the cache, or set --cache to a folder on another disk"
	hintMemory = "give the builder more memory (1 GiB for each job), or run fewer jobs with --jobs"
	hintTime   = "set a longer --compile-timeout; or build on a machine with more CPUs, and set a higher --jobs"
	hintBreak  = "choose a newer driver of the same branch: this driver does not know the interfaces of this kernel"
	hintImage  = "run the builder on a system with a newer C library, such as a newer Debian; to see the " +
		"version of this machine's C library: ldd --version"
	hintLog = "read the first error lines of the build's log"
)

// checks has the error for each of NVIDIA's sanity checks, by the check's name. The driver's makefiles run them before
// a build.
var checks = map[string]struct {
	kind fault.Kind
	text string
	hint string
}{
	"cc_sanity_check": {fault.Internal, "the toolchain's compiler cannot make object files",
		"check that CC in this kernel's toolchain_env is a compiler that runs, and that toolchain.tar.xz is complete"},
	"cc_version_check": {fault.Internal, "the driver's makefiles refuse the compiler's version", hintLog},
	"dom0_sanity_check": {fault.Unsupported, "the driver does not support a Xen host kernel",
		"choose another kernel"},
	"xen_sanity_check": {fault.Unsupported, "the driver does not support a Xen kernel",
		"choose another kernel"},
	"preempt_rt_sanity_check": {fault.Unsupported, "the driver does not support a real-time kernel",
		"choose another kernel"},
	"vgpu_kvm_sanity_check": {fault.Unsupported, "the vGPU host driver does not support this kernel",
		"choose another kernel or driver"},
	"module_symvers_sanity_check": {fault.InputMissing, "the kernel's Module.symvers is missing or empty",
		"publish a kernel-headers.tgz that holds Module.symvers"},
}

// contextFault adds a fault kind to an error that the end of the context caused. An error that has a kind stays
// unchanged.
func contextFault(ctx context.Context, err error) error {
	var classified *fault.Error
	switch {
	case err == nil || ctx.Err() == nil || errors.As(err, &classified):
		return err
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fault.Wrap(fault.TimedOut, err, hintTime)
	}
	return fault.Wrap(fault.Cancelled, err, "")
}

// diagnose returns an error with a kind, a text and a hint for a failed program. An error of the sandbox or of the
// context stays unchanged.
func diagnose(err error, f findings) error {
	var exit *sandbox.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	switch check := checks[f.check]; {
	case f.disk != "":
		return fault.New(fault.DiskFull, f.disk, hintDisk)
	case f.memory != "":
		return fault.New(fault.OutOfMemory, f.memory, hintMemory)
	case exit.Killed():
		return fault.New(fault.OutOfMemory, "the compile was killed, probably because memory ran out", hintMemory)
	case f.library != "": // before compiler errors: if a tool cannot run, conftest's results are wrong
		return fault.New(fault.Usage, f.library, hintImage)
	case f.source != "":
		return fault.New(fault.APIBreak, f.source, hintBreak)
	case f.modpost != "":
		return fault.New(fault.APIBreak, "modpost: "+f.modpost, hintBreak)
	case f.check != "" && check.text != "":
		return fault.New(check.kind, check.text, check.hint)
	case f.missing != "":
		return fault.New(fault.Internal, f.missing,
			"publish a toolchain.tar.xz that contains the missing program; or install the program on this machine (for "+
				"make, perl and the C library's tools: apt-get install build-essential)")
	case f.make != "" && f.lastLine != "":
		return fault.New(fault.Internal, fmt.Sprintf("make: %s; the line before this message: %s", f.make, f.lastLine),
			hintLog)
	case f.make != "":
		return fault.New(fault.Internal, "make: "+f.make, hintLog)
	case f.lastLine != "":
		return fault.New(fault.Internal, fmt.Sprintf("%v: %s", err, f.lastLine), hintLog)
	}
	return fault.Wrap(fault.Internal, err, hintLog)
}
