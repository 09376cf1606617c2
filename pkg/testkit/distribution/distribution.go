// Package distribution runs the registry of the distribution project, as
// Debian packages it, for one test: a registry that nobody here wrote. Only
// test files import it. It refuses to stand in for one with the referrers API:
// version 2.8 has none, and that is what it is for.
package distribution

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"golang.org/x/crypto/bcrypt"
)

// Program is the registry's name on PATH; Debian's package has the same.
// Tests that need it are skipped where it is not there.
const Program = "docker-registry"

const config = `version: 0.1
log: {level: info, formatter: text}
storage:
  filesystem: {rootdirectory: %q}
http: {addr: "127.0.0.1:0"}
`

// protection is added to config for a registry that wants a password.
const protection = `auth: {htpasswd: {realm: test, path: %q}}
`

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:[0-9]+)`)

// User and Password are what [StartProtected] asks for.
const (
	User     = "somebody"
	Password = "a password of this test"
)

// StartProtected is [Start] for a registry that answers nobody who lacks User and
// Password.
func StartProtected(t testing.TB) string {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(Password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "htpasswd")
	if err := os.WriteFile(file, fmt.Appendf(nil, "%s:%s\n", User, hash), 0o600); err != nil {
		t.Fatal(err)
	}
	return start(t, fmt.Sprintf(protection, file))
}

// Start runs an empty registry that ends with the test and returns its
// host:port.
func Start(t testing.TB) string {
	t.Helper()
	return start(t, "")
}

// StartMirror is Start for a registry that fetches what it is asked for from another one,
// at this URL, and keeps it ("pull through cache" in the distribution project's
// documentation).
func StartMirror(t testing.TB, of string) string {
	t.Helper()
	return start(t, fmt.Sprintf("proxy: {remoteurl: %q}\n", of))
}

// start runs a registry with more settings.
func start(t testing.TB, more string) string {
	t.Helper()
	program, err := exec.LookPath(Program)
	if err != nil {
		t.Skipf("%s is not on PATH: install Debian's package of that name (deploy/setup.sh test)", Program)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(file, fmt.Appendf(nil, config+"%s", filepath.Join(dir, "data"), more), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "serve", file)
	cmd.Env = []string{"HOME=/nonexistent", "OTEL_TRACES_EXPORTER=none"}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close() // the program has its own
	stop := func(rest chan struct{}) {
		if err := cmd.Process.Kill(); err != nil {
			t.Errorf("stop the registry: %v", err)
		}
		<-rest
		_ = cmd.Wait() // killed
		_ = r.Close()
	}
	// It says where it listens, or ends.
	var said []string
	for lines := bufio.NewScanner(r); lines.Scan(); {
		if m := listening.FindStringSubmatch(lines.Text()); m != nil {
			rest := make(chan struct{})
			go func() {
				defer close(rest)
				_, _ = io.Copy(io.Discard, r)
			}()
			t.Cleanup(func() { stop(rest) })
			return m[1]
		}
		said = append(said, lines.Text())
	}
	ended := make(chan struct{})
	close(ended)
	stop(ended)
	t.Fatalf("the registry ended and said %q", said)
	return ""
}
