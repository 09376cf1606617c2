// Package program writes programs that a test runs. Only test files import it.
// It refuses to leave one that cannot be run at once.
package program

import (
	"os"
	"syscall"
	"testing"
)

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
