package compile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/builder/internal/untrusted"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/sandbox"
)

// Kbuild tests some hundred flags of the compiler each time that it starts, by
// compiling nothing (try-run in the kernel's scripts/Makefile.compiler): with clang this
// takes longer than all that a sibling kernel or the next driver leaves to do, and a
// build starts make twice. What the compiler answers hangs on its arguments alone. So
// the kernel's own makefiles are run once, with no source of a driver's in the sandbox,
// the guard writes each answer down, and from then on gives it where the arguments are
// the same, to the letter. A driver's makefiles cannot write to these.
const (
	insideFlagTests    = "/prebake/flag-tests"
	insideNewFlagTests = "/prebake/flag-tests-new"

	flagTestKind = "flag-tests-1"
	maxFlagTests = 4096
	maxFlagTest  = 64 << 10
)

// flagTests shows the guard of all sandboxes what the compiler answers to the kernel's
// tests of flags. Where they cannot be had, make tests as usual.
func (b *build) flagTests(ctx context.Context, v *view) error {
	key := cas.NewKey(flagTestKind).Add("recipe", Recipe).Add("guard", guardScript).Add("kernel view",
		v.Digest).Add("toolchain", b.r.ToolchainDigest).Add("host tools", b.r.HostDigest)
	// What is on make's command line goes into the flags.
	variables := slices.DeleteFunc(slices.Clone(b.args),
		func(arg string) bool { return !strings.Contains(arg, "=") || strings.HasPrefix(arg, "KERNEL_UNAME=") })
	key.Add("variables", strings.Join(variables, "\n"))
	dir, _, err := b.r.Cache.Tree(ctx, flagTestKind, key.String(), func(ctx context.Context, dir string) error {
		return b.testFlags(ctx, variables, dir)
	})
	if err != nil {
		return err
	}
	b.box.Binds = append(b.box.Binds, sandbox.Bind{Host: dir, Inside: insideFlagTests})
	return nil
}

// testFlags has the kernel's makefiles test flags for a module without sources, and
// keeps the answers in dir.
func (b *build) testFlags(ctx context.Context, variables []string, dir string) error {
	work := filepath.Join(b.r.WorkDir, "flag-tests")
	src, told := filepath.Join(work, "src"), filepath.Join(work, "told")
	if err := os.MkdirAll(told, 0o755); err != nil {
		return err
	}
	if err := write(filepath.Join(src, "Kbuild"), "obj-m :=\n", 0o644); err != nil {
		return err
	}
	box, err := withFaultFile(b.box, filepath.Join(work, "trouble"))
	if err != nil {
		return err
	}
	box.Binds = slices.DeleteFunc(box.Binds,
		func(bind sandbox.Bind) bool { return bind.Inside == insideSource || bind.Inside == insideOut })
	box.Binds = append(box.Binds,
		sandbox.Bind{Host: src, Inside: insideSource, Writable: true},
		sandbox.Bind{Host: told, Inside: insideNewFlagTests, Writable: true})
	box.Argv, box.Output = slices.Concat([]string{"make", "-C", insideKernel, "M=" + insideSource, "modules", "-j1"},
		variables), io.Discard
	box.Limits.Time = 10 * time.Minute
	err = sandbox.Run(ctx, box)
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	var exit *sandbox.ExitError
	if err != nil && !errors.As(err, &exit) { // that make fails is for the driver's own run to tell
		return err
	}
	if err := compilerFault(filepath.Join(work, "trouble")); err != nil {
		return err
	}
	left, err := untrusted.Open(told)
	if err != nil {
		return err
	}
	defer left.Close()
	files, err := left.Files()
	if err != nil {
		return err
	}
	for _, name := range files[:min(len(files), maxFlagTests)] {
		if strings.Contains(name, "/") || strings.HasSuffix(name, ".new") {
			continue
		}
		if _, err := left.Copy(filepath.Join(dir, name), name, maxFlagTest); err != nil {
			return fmt.Errorf("keep test of flags: %w", err)
		}
	}
	return os.RemoveAll(work)
}
