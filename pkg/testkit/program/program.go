// Package program writes and compiles programs that a test can run at once. Only test files import it.
package program

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
)

// Build compiles a program of this module without cgo, and returns its path. arch "" means this machine's architecture.
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
