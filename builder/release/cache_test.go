package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/inputs"
)

// TestDefaultCache checks that the release keeps its packages in the folder from which make clean-cache removes them:
// with PREBAKE_STATE, and without.
func TestDefaultCache(t *testing.T) {
	home, state := t.TempDir(), t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CACHE_HOME", "")
	inputs.Files(t, "../../Makefile")
	for _, set := range []string{"", state} {
		t.Setenv("PREBAKE_STATE", set)
		said, err := exec.CommandContext(t.Context(), "make", "-C", "../..", "--no-print-directory", "--eval",
			"print-state:; @echo $(STATE)", "print-state").Output()
		if err != nil {
			t.Fatal(err)
		}
		want := filepath.Join(strings.TrimSpace(string(said)), "release")
		if got, err := defaultCache(); err != nil || got != want {
			t.Errorf("defaultCache() with PREBAKE_STATE=%q = %q, %v; want %q", set, got, err, want)
		}
	}
}
