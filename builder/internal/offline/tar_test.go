package offline_test

import (
	"os/exec"
	"testing"
)

// untar unpacks the bundles in order into one new folder with GNU tar, and returns the folder.
func untar(t *testing.T, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, file := range files {
		if out, err := exec.CommandContext(t.Context(), "tar", "-xf", file, "-C", dir).CombinedOutput(); err != nil {
			t.Fatalf("tar: %v: %s", err, out)
		}
	}
	return dir
}
