package compile

import (
	"bytes"
	_ "embed"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/prebake/prebake/builder/internal/untrusted"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
)

const (
	insideGuard  = "/prebake/guard"
	insideFaults = "/prebake/trouble"

	faultFile = "compiler"
	faultSize = 4096 // bytes
)

//go:embed guard.sh
var guardScript string

// newGuard writes the guard, a wrapper script around the compiler, and puts it first in the PATH of all sandboxes.
func (b *build) newGuard() error {
	script := strings.NewReplacer("@COMPILER@", b.t.compiler, "@TROUBLE@", insideFaults+"/"+faultFile,
		"@FLAGTESTS@", insideFlagTests, "@NEWFLAGTESTS@", insideNewFlagTests, "@SEPARATOR@", "\x1f").Replace(guardScript)
	dir := filepath.Join(b.r.WorkDir, "guard")
	b.box.Binds = append(b.box.Binds, sandbox.Bind{Host: dir, Inside: insideGuard})
	b.box.Env["PATH"] = insideGuard + ":" + b.box.Env["PATH"]
	return write(filepath.Join(dir, filepath.Base(b.t.compiler)), script, 0o755)
}

// withFaultFile adds a folder to a sandbox. The guard records the compiler's faults there, and [compilerFault] reads
// them.
func withFaultFile(box sandbox.Config, dir string) (sandbox.Config, error) {
	// The file gets its full size now, because the disk may be full when the guard writes.
	err := write(filepath.Join(dir, faultFile), strings.Repeat("\n", faultSize), 0o644)
	box.Binds = append(slices.Clone(box.Binds), sandbox.Bind{Host: dir, Inside: insideFaults, Writable: true})
	return box, err
}

var (
	noDisk   = regexp.MustCompile(`(?i)no space left|quota exceeded`)
	noMemory = regexp.MustCompile(`(?i)killed|status 137|memory|temporarily unavailable`)
)

// compilerFault returns the fault that the guard recorded in a folder, or nil. The guard records a fault if the
// compiler was killed, crashed, or had no memory or disk space. A fault says nothing about the compiled program, so it
// must not become the result of a conftest test.
func compilerFault(dir string) error {
	text, err := untrusted.ReadFile(dir, faultFile, 2*faultSize)
	if err != nil {
		return fault.Wrap(fault.Internal, fmt.Errorf("read the errors that the compiler's wrapper recorded: %w", err),
			hintLog)
	}
	text = bytes.TrimSpace(text)
	if len(text) == 0 {
		return nil
	}
	said := fmt.Sprintf("the compiler failed, and the compiled source file is not the reason: %.300q", text)
	switch {
	case noDisk.Match(text):
		return fault.New(fault.DiskFull, said, hintDisk)
	case noMemory.Match(text):
		return fault.New(fault.OutOfMemory, said, hintMemory)
	}
	return fault.New(fault.Internal, said,
		"check the machine's memory and disk, then run the command again; if the error stays, the cause is a fault of "+
			"the toolchain's compiler: report it to the toolchain's publisher")
}
