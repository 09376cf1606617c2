// Package testserver runs the real server program for a test. Only test files import it. The server listens on
// loopback, and ends with its test.
package testserver

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Token is the token of every server that Start starts.
const Token = "0123456789abcdef"

// maxLog is how many bytes of the server's log a failed test shows.
const maxLog = 1500

// Start runs `server serve` with its data in a folder until the test ends. It returns the server's URL, without a final
// slash. args are additional flags.
func Start(t testing.TB, program, data string, args ...string) (url string) {
	t.Helper()
	var log bytes.Buffer
	ctx, cancel := context.WithCancel(context.Background())
	always := []string{"serve", "--listen", "127.0.0.1:0", "--data", data, "--grace", "1s"}
	cmd := exec.CommandContext(ctx, program, append(always, args...)...)
	cmd.Env = []string{"PREBAKE_TOKEN=" + Token, "HOME=" + data, "PATH=" + os.Getenv("PATH")}
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // cancel has sent SIGTERM to the server
		if t.Failed() {
			text := log.String()
			t.Logf("the server logged: %s", text[max(0, len(text)-maxLog):])
		}
	})
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if raw, err := os.ReadFile(filepath.Join(data, "address")); err == nil {
			return strings.TrimSpace(string(raw))
		}
		if time.Now().After(end) {
			t.Fatal("the server has no address after a minute")
		}
	}
}
