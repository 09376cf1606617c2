// Package program compiles and writes programs that a test can run immediately. Only test files import it.
package program

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/inputs"
)

// Compile compiles a program of this module for an architecture, and names its sources to Go's cache of test results.
// pkg is the folder of the program's package, such as pkg/vm/guestinit. out is the path of the compiled program. If cgo
// is true and the program is for arm64 on another machine, Debian's cross compiler links it.
func Compile(t testing.TB, out, pkg, arch string, cgo bool) {
	t.Helper()
	env := append(os.Environ(), "GOARCH="+arch, "CGO_ENABLED=0")
	if cgo {
		env = append(env, "CGO_ENABLED=1", "CGO_CFLAGS=-O1 -Wno-deprecated-declarations")
	}
	if cgo && arch == "arm64" && runtime.GOARCH != arch {
		env = append(env, "CC=aarch64-linux-gnu-gcc-12")
	}
	pkg = "github.com/prebake/prebake/" + pkg
	inputs.Sources(t, env, pkg)
	cmd := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", out, pkg)
	cmd.Env = env
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", pkg, err, text)
	}
}

// Build compiles a program of this module without cgo, and returns its path. arch "" means this machine's architecture.
// See [Compile].
func Build(t testing.TB, pkg, arch string) string {
	t.Helper()
	if arch == "" {
		arch = runtime.GOARCH
	}
	out := filepath.Join(t.TempDir(), filepath.Base(pkg))
	Compile(t, out, pkg, arch, false)
	return out
}

// Write writes a program that everybody may run. After a plain os.WriteFile, a child process that another test forks
// may still have the file open for writing. The kernel then refuses to run the file ("text file busy",
// https://go.dev/issue/22315).
func Write(t testing.TB, path string, content []byte) {
	t.Helper()
	syscall.ForkLock.RLock()
	err := os.WriteFile(path, content, 0o600)
	syscall.ForkLock.RUnlock()
	if err == nil {
		err = os.Chmod(path, 0o755) // whatever the umask is
	}
	if err != nil {
		t.Fatal(err)
	}
}
