package deploy_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestCleanCache checks that make clean-cache removes each folder that the demo, the tests and the benchmarks keep in
// their state, and nothing else there.
func TestCleanCache(t *testing.T) {
	t.Parallel()
	state := t.TempDir()
	kept := regexp.MustCompile(`\b[Ss]tate, "([a-z-]+)"|STATE\)/([a-z-]+)`)
	names := map[string]bool{}
	for _, name := range append(files(t, ".go"), "Makefile") {
		if !strings.HasPrefix(name, "deploy/") && name != "Makefile" {
			continue
		}
		for _, m := range kept.FindAllStringSubmatch(read(t, name), -1) {
			names[m[1]+m[2]] = true
		}
	}
	if len(names) < 6 {
		t.Fatalf("the folders in the state are %v; want 6 or more: does the test find them?", names)
	}
	names["of-a-user"] = true
	for name := range names {
		if err := os.MkdirAll(filepath.Join(state, name, "sub"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "make", "clean-cache")
	cmd.Dir, cmd.Env = root, append(os.Environ(), "PREBAKE_STATE="+state)
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make clean-cache: %v\n%s", err, said)
	}
	left, err := os.ReadDir(state)
	if err != nil {
		t.Fatal(err)
	}
	own := false
	for _, e := range left {
		if e.Name() == "of-a-user" {
			own = true
			continue
		}
		t.Errorf("make clean-cache left the folder %s", e.Name())
	}
	if !own {
		t.Error("make clean-cache removed a folder of a user")
	}
}
