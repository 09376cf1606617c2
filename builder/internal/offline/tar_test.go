package offline_test

import (
	"os/exec"
	"testing"
)

// untar unpacks the bundles with GNU tar, one after the other, into one new folder. It returns the folder.
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
