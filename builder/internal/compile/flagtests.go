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

// Kbuild tests some hundred compiler flags each time it starts. Each test compiles an empty file (try-run in the
// kernel's scripts/Makefile.compiler). With clang these tests take longer than all other work for a sibling kernel or
// the next driver.
//
// The result depends on the compiler's arguments only. So this package stores the results once:
//   - The kernel's makefiles run in a sandbox without any source of a driver. There a wrapper around the compiler
//     (guard.sh) records each result.
//   - In later sandboxes the wrapper returns the stored result if the arguments are the same.
//   - A driver's makefiles cannot write to the stored results.
const (
	insideFlagTests    = "/prebake/flag-tests"
	insideNewFlagTests = "/prebake/flag-tests-new"

	flagTestKind = "flag-tests-1"
	maxFlagTests = 4096     // number of stored results
	maxFlagTest  = 64 << 10 // bytes of one result
)

// flagTests lets all sandboxes of the build read the stored results of the kernel's flag tests. If no results are
// stored, it first runs the tests.
func (b *build) flagTests(ctx context.Context, v *view) error {
	key := cas.NewKey(flagTestKind).Add("recipe", Recipe).Add("guard", guardScript).Add("kernel view",
		v.Digest).Add("toolchain", b.r.ToolchainDigest).Add("host tools", b.r.HostDigest)
	// Variables on `make`'s command line decide which flags a test uses.
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

// testFlags runs the kernel's makefiles for a module without sources, and copies the results of their flag tests to
// dir.
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
	if err != nil && !errors.As(err, &exit) { // the build of the driver reports a failure of `make`
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
			return fmt.Errorf("store in the cache which compiler flags work: %w", err)
		}
	}
	return os.RemoveAll(work)
}
