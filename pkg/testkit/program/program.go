// Package program writes and compiles programs that a test runs. Only test files import it.
// It refuses to leave one that cannot be run at once.
package program

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
)

// Build compiles a program of this module without C, for this machine's architecture or
// another one ("" is this), and returns its path.
func Build(t testing.TB, pkg, arch string) string {
	t.Helper()
	if arch == "" {
		arch = runtime.GOARCH
	}
	out := filepath.Join(t.TempDir(), filepath.Base(pkg))
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", out, "github.com/prebake/prebake/"+pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", pkg, err, text)
	}
	return out
}

// Write writes a program for everybody to run. A plain os.WriteFile is not
// enough where other tests start programs at the same time: a child that is
// forked meanwhile holds the open file for a moment, and for as long the
// kernel refuses to run it ("text file busy", https://go.dev/issue/22315).
func Write(t testing.TB, path string, content []byte) {
	t.Helper()
	syscall.ForkLock.RLock()
	err := os.WriteFile(path, content, 0o600)
	syscall.ForkLock.RUnlock()
	if err == nil {
		err = os.Chmod(path, 0o755) // whatever the umask
	}
	if err != nil {
		t.Fatal(err)
	}
}
