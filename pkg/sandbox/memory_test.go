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

// memoryVariable makes the test binary print what it knows about its memory.
const memoryVariable = "PREBAKE_TEST_MEMORY"

// TestMemoryProcess is the child process in a control group. Without the variable it does nothing.
func TestMemoryProcess(t *testing.T) {
	if os.Getenv(memoryVariable) == "" {
		return
	}
	before := sandbox.MemoryKills()
	err := exec.CommandContext(t.Context(), "awk", `BEGIN { s = "x"; while (length(s) < 300000000) s = s s }`).Run()
	fmt.Printf("MEMORY limit %d, kills %d, %v\n", sandbox.MemoryLimit(), sandbox.MemoryKills()-before, err)
}

// TestMemoryLimit checks that a process finds the memory limit of its control group, and the number of processes that
// the kernel killed for it.
func TestMemoryLimit(t *testing.T) {
	t.Parallel()
	procs := memorygroup.New(t, 96<<20)
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `echo $$ >"$0" && exec "$1" -test.run='^TestMemoryProcess$'`,
		procs, os.Args[0])
	cmd.Env = append(os.Environ(), memoryVariable+"=1", inGuest+"=") // the guest is prepared already
	out, err := cmd.CombinedOutput()
	if want := fmt.Sprintf("MEMORY limit %d, kills 1, signal: killed\n", 96<<20); err != nil ||
		!strings.Contains(string(out), want) {
		t.Errorf("in a group with 96 MiB: %v, %s; want %s", err, out, want)
	}
}
