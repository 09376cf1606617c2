// Package program writes and compiles programs that a test can run at once. Only test files import it.
package program

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/inputs"
)

// Compile compiles a program of this module for an architecture, and names its sources to Go's cache of test results.
// pkg is the folder of its package, as in pkg/vm/guestinit; out is the path of the program. With cgo, a program for
// arm64 on another machine is linked by Debian's cross compiler.
func Compile(ctx context.Context, out, pkg, arch string, cgo bool) error {
	env := append(os.Environ(), "GOARCH="+arch, "CGO_ENABLED=0")
	if cgo {
		env = append(env, "CGO_ENABLED=1", "CGO_CFLAGS=-O1 -Wno-deprecated-declarations")
	}
	if cgo && arch == "arm64" && runtime.GOARCH != arch {
		env = append(env, "CC=aarch64-linux-gnu-gcc-12")
	}
	pkg = "github.com/prebake/prebake/" + pkg
	if err := inputs.Sources(ctx, env, pkg); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", out, pkg)
	cmd.Env = env
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", pkg, err, text)
	}
	return nil
}

// Build compiles a program of this module without cgo, and returns its path. arch "" means this machine's architecture.
// See [Compile].
func Build(t testing.TB, pkg, arch string) string {
	t.Helper()
	if arch == "" {
		arch = runtime.GOARCH
	}
	out := filepath.Join(t.TempDir(), filepath.Base(pkg))
	if err := Compile(t.Context(), out, pkg, arch, false); err != nil {
		t.Fatal(err)
	}
	return out
}

// Write writes a program that everybody may run. After a plain os.WriteFile, a child that another test forks may hold
// the file open, and the kernel does not run the file ("text file busy", https://go.dev/issue/22315).
func Write(t testing.TB, path string, content []byte) {
	t.Helper()
	syscall.ForkLock.RLock()
	err := os.WriteFile(path, content, 0o600)
	syscall.ForkLock.RUnlock()
	if err == nil {
		err = os.Chmod(path, 0o755) // independent of the umask
	}
	if err != nil {
		t.Fatal(err)
	}
}
