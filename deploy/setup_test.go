package deploy_test

import (
	"os/exec"
	"strings"
	"testing"
)

// TestSetup checks which packages make installs for a target. The demo uses no database, no browser and no npm
// registry, so a first run must not need them. The tests use everything.
func TestSetup(t *testing.T) {
	t.Parallel()
	const everything, modules = "deploy/setup.sh\n", "deploy/browser/modules.sh"
	for _, row := range []struct {
		target     string
		want, deny []string
	}{
		{"demo", []string{"deploy/setup.sh build run\n"}, []string{everything, modules}},
		{"test", []string{everything, modules}, nil},
	} {
		cmd := exec.CommandContext(t.Context(), "make", "--dry-run", row.target)
		cmd.Dir = root
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("make --dry-run %s: %v\n%s", row.target, err, out)
			continue
		}
		for _, command := range row.want {
			if !strings.Contains(string(out), command) {
				t.Errorf("make %s does not run %q", row.target, command)
			}
		}
		for _, command := range row.deny {
			if strings.Contains(string(out), command) {
				t.Errorf("make %s runs %q; want only what it needs", row.target, command)
			}
		}
	}
}
