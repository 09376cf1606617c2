package sign_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/faulttable"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

// fullVariable makes the test binary generate a key in the folder that the variable names, on a full disk.
const fullVariable = "PREBAKE_TEST_FULL_DISK"

// TestFullDiskProcess generates a key on a full disk. Without the variable it does nothing.
func TestFullDiskProcess(t *testing.T) {
	dir := os.Getenv(fullVariable)
	if dir == "" {
		return
	}
	if err := faulttable.Fill(filepath.Join(dir, "filler")); err != nil {
		t.Fatal(err)
	}
	if err := sign.GenerateKey(filepath.Join(dir, "key")); !fault.Is(err, fault.DiskFull) || fault.Hint(err) == "" {
		t.Errorf("GenerateKey = %v; want disk full, and a hint", err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "key*"))
	if err != nil || len(left) > 0 {
		t.Errorf("it left %q, %v", left, err)
	}
}

// TestGenerateKeyOnFullDisk checks the kind of the error on a full disk. A node that compiles needs it: only then it
// waits until the disk may have space.
func TestGenerateKeyOnFullDisk(t *testing.T) {
	t.Parallel()
	installed.Program(t, "bwrap")
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "bwrap", "--dev-bind", "/", "/", "--size", "65536", "--tmpfs", dir,
		"--die-with-parent", "--", os.Args[0], "-test.run=^TestFullDiskProcess$", "-test.v")
	cmd.Env = append(os.Environ(), fullVariable+"="+dir)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestFullDiskProcess") {
		t.Errorf("%v: %s", err, out)
	}
}
