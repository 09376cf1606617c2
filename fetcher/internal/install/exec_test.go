package install_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/fault"
)

// TestExecProcess is the part of TestExecReachesTheNode that runs as the agent in a container. Without the environment
// variable, the test does nothing.
func TestExecProcess(t *testing.T) {
	root := os.Getenv("PREBAKE_TEST_EXEC_ROOT")
	if root == "" {
		return
	}
	node, err := noderoot.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	s, err := install.Open(node, os.Getenv("PREBAKE_TEST_EXEC_DIR"), true)
	if err != nil {
		t.Fatal(err)
	}
	switch os.Getenv("PREBAKE_TEST_EXEC_DO") {
	case "allow":
		for _, want := range []bool{true, false} { // the second call must change nothing
			if did, err := s.EnsureExec(func() {}); err != nil || did != want {
				t.Errorf("EnsureExec = %t, %v; want %t", did, err, want)
			}
		}
	case "refuse":
		if did, err := s.EnsureExec(func() {}); did || !fault.Is(err, fault.Unusable) ||
			!strings.Contains(fault.Hint(err), "hostPID") {
			t.Errorf("EnsureExec = %t, %v (%s); want it refused, and how to do it", did, err, fault.Hint(err))
		}
	case "revoke":
		if err := s.RevokeExec(); err != nil {
			t.Error(err)
		}
	}
}

// TestExecReachesTheNode checks that EnsureExec in a container also allows programs to run on the node. The script
// simulates a node with a folder that is mounted noexec, and a pod that mounts the node's root with HostToContainer
// propagation. It needs util-linux.
func TestExecReachesTheNode(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: namespaces")
	}
	probe := exec.CommandContext(t.Context(), "unshare", "--mount", "--pid", "--fork", "true")
	if out, err := probe.CombinedOutput(); errors.Is(err, exec.ErrNotFound) {
		t.Fatal(err)
	} else if err != nil {
		t.Skipf("root may not make namespaces here: %v: %s", err, out)
	}
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	node := filepath.Join(dir, "node.sh")
	const script = `set -eu
mount --make-rshared /
mkdir "$D/part" "$D/root"
mount -t tmpfs -o noexec,nosuid,nodev tmpfs "$D/part"
mkdir "$D/part/nv"
cp /bin/true "$D/part/nv/true"
runs() { if "$D/part/nv/true" 2>/dev/null; then echo "$1: runs"; else echo "$1: forbidden"; fi; }
pod() {
	unshare --mount --propagation slave sh -euc '
		mount --rbind / "$D/root"
		mount --make-rslave "$D/root"
		if [ "$1" = refuse ]; then mount -t tmpfs none "$D/root/proc"; fi
		PREBAKE_TEST_EXEC_ROOT=$D/root PREBAKE_TEST_EXEC_DIR=$D/part/nv PREBAKE_TEST_EXEC_DO=$1 "$SELF" -test.run="^TestExecProcess$"
		if [ "$1" = allow ]; then "$D/root/$D/part/nv/true" && echo "in the pod: runs"; fi
	' sh "$1"
}
runs before
pod refuse
runs refused
pod allow
runs allowed
grep " $D/part/nv " /proc/self/mountinfo | grep -o " rw,nosuid,nodev[^ ]*"
pod revoke
runs revoked
`
	if err := os.WriteFile(node, []byte(script), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "--pid", "--fork", "--mount-proc", "--propagation",
		"private", "sh", node)
	cmd.Env = append(os.Environ(), "D="+dir, "SELF="+self)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"before: forbidden", "refused: forbidden", "in the pod: runs", "allowed: runs",
		" rw,nosuid,nodev", "revoked: forbidden"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the node said no %q:\n%s", want, out)
		}
	}
}
