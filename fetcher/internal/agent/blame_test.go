package agent_test

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
)

// filling is a kernel that refuses all modules. From the first refusal on, no small file can be written.
type filling struct {
	kmod.System
	n *node
	t *testing.T
}

func (f filling) InitModule([]byte, string) error {
	if err := os.MkdirAll(filepath.Join(f.n.root, installDir, ".prebake/tmp-file"), 0o755); err != nil {
		f.t.Error(err)
	}
	return syscall.ENOENT
}

// TestFailureOnFullDisk checks that a failed load on a full disk leaves no open record, which would count as a crash
// after the next boot.
func TestFailureOnFullDisk(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	n.parts.Kernel = filling{n.kernel, n, t}
	if _, err := n.run(t, ref, p.Digest, c.Driver); !fault.Is(err, fault.Rejected) {
		t.Fatalf("Run = %v; want rejected", err)
	}
	raw, err := os.ReadFile(filepath.Join(n.root, installDir, ".prebake/attempts.json"))
	if err == nil && strings.Contains(string(raw), `"open": true`) {
		t.Errorf("the record is still open: %s", raw)
	}
}

// TestForeignLoading checks a driver that another program is just loading. It is not called a foreign driver, and the
// agent waits, even if it may replace foreign drivers.
func TestForeignLoading(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	n.cfg.ReplaceForeign = true
	sample.Write(t, n.root, "proc/modules", "nvidia 4096 1 - Loading 0x0 (OE+)\n")
	sample.Write(t, n.root, "sys/module/nvidia/version", oldVersion+"\n")
	_, err := n.run(t, ref, p.Digest, c.Driver)
	if !fault.Is(err, fault.Busy) || fault.Hint(err) == "" || !strings.Contains(err.Error(), "still loading") ||
		len(n.kernel.calls) > 0 {
		t.Errorf("Run = %v, calls %v; want busy and no call", err, n.kernel.calls)
	}
}
