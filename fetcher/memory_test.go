package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/testkit"
)

// TestIdleMemory checks the resident memory of the program while it watches a driver, as it is shipped. "make bench"
// measures it with a real driver.
func TestIdleMemory(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("left out with -short; make test runs it")
	}
	dir := t.TempDir()
	program, keys, layout := filepath.Join(dir, "fetcher"), filepath.Join(dir, "keys.pem"), filepath.Join(dir, "layout")
	goTool(t, "build", "-trimpath", "-tags=grpcnotrace", "-ldflags", "-s -w", "-o", program, ".") // as in Makefile
	key := testkit.NewKey(t)
	if err := os.WriteFile(keys, key.PEM(t), 0o600); err != nil {
		t.Fatal(err)
	}
	c := sample.NewCell(t, "17800.0.47", "535.261.03")
	sample.Publish(t, "oci:"+layout, key, c)
	cmd := exec.CommandContext(t.Context(), program, "run", "--registry", "oci:"+layout, "--key", keys, "--host-root",
		sample.Root(t, c, 1), "--builder", "never", "--no-load", "--driver", c.Driver.Version, "--interval", "1s")
	var stderr bytes.Buffer
	watches := make(chan struct{})
	// The structure hides the method ReadFrom of the buffer, which would pass by the watcher.
	cmd.Stdout = struct{ io.Writer }{&watcher{text: "staged", seen: func() { close(watches) }}}
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		t.Fatalf("fetcher run = %v\n%s", err, &stderr)
	case <-watches:
	}
	time.Sleep(5 * time.Second) // some checks
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\nVmRSS:")
	var kib int
	if _, err := fmt.Sscanf(rest, "%d kB", &kib); err != nil {
		t.Fatalf("read VmRSS: %v\n%s", err, text)
	}
	const bound = 20 << 10
	t.Logf("%d KiB", kib)
	if kib >= bound {
		t.Errorf("fetcher run has %d KiB while it watches; want less than %d", kib, bound)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("fetcher run = %v\n%s", err, &stderr)
	}
}
