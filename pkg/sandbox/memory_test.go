package sandbox_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/testkit/memorygroup"
)

// memoryVariable is an environment variable. If it is set, TestMemoryProcess prints what this process knows about its
// memory.
const memoryVariable = "PREBAKE_TEST_MEMORY"

// TestMemoryProcess is no test of its own. It is the process that TestMemoryLimit runs in a control group. Without the
// variable it does nothing.
func TestMemoryProcess(t *testing.T) {
	if os.Getenv(memoryVariable) == "" {
		return
	}
	before := sandbox.MemoryKills()
	err := exec.CommandContext(t.Context(), "awk", `BEGIN { s = "x"; while (length(s) < 300000000) s = s s }`).Run()
	fmt.Printf("MEMORY limit %d, kills %d, %v\n", sandbox.MemoryLimit(), sandbox.MemoryKills()-before, err)
}

// TestMemoryLimit checks that a process finds the memory limit of its control group, and how many processes the kernel
// has killed because of this limit.
func TestMemoryLimit(t *testing.T) {
	t.Parallel()
	procs := memorygroup.New(t, 96<<20)
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `echo $$ >"$0" && exec "$1" -test.run='^TestMemoryProcess$'`,
		procs, os.Args[0])
	cmd.Env = append(os.Environ(), memoryVariable+"=1", inGuest+"=") // enterGuest has run already
	out, err := cmd.CombinedOutput()
	if want := fmt.Sprintf("MEMORY limit %d, kills 1, signal: killed\n", 96<<20); err != nil ||
		!strings.Contains(string(out), want) {
		t.Errorf("in a group with 96 MiB: %v, %s; want %s", err, out, want)
	}
}
