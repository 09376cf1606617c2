// Package distribution runs the registry of the distribution project, from Debian's package docker-registry. Tests use
// it as a registry that is not Prebake's own. Its version 2.8 has no referrers API. Only test files import the package.
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

	"github.com/prebake/prebake/pkg/testkit/installed"
)

// Program is the name of the registry's program and of its Debian package. See [installed.Program] for tests on a
// machine without it.
const Program = "docker-registry"

const config = `version: 0.1
log: {level: info, formatter: text}
storage:
  filesystem: {rootdirectory: %q}
http: {addr: "127.0.0.1:0"}
`

// protection is the part of the configuration that makes the registry require a password.
const protection = `auth: {htpasswd: {realm: test, path: %q}}
`

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:[0-9]+)`)

// User and Password are the credentials that a registry of [StartProtected] requires.
const (
	User     = "somebody"
	Password = "a password of this test"
)

// StartProtected is like [Start], but the registry answers only requests with User and Password.
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

// Start runs an empty registry until the test ends, and returns its host:port.
func Start(t testing.TB) string {
	t.Helper()
	return start(t, "")
}

// StartMirror is like [Start], but the registry fetches content that it lacks from the registry at the given URL, and
// stores it (the distribution project's "pull through cache").
func StartMirror(t testing.TB, of string) string {
	t.Helper()
	return start(t, fmt.Sprintf("proxy: {remoteurl: %q}\n", of))
}

// start runs a registry with additional lines in its configuration.
func start(t testing.TB, more string) string {
	t.Helper()
	program := installed.Program(t, Program)
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
	_ = w.Close() // the program has its own copy of this end of the pipe
	stop := func(rest chan struct{}) {
		if err := cmd.Process.Kill(); err != nil {
			t.Errorf("stop the registry: %v", err)
		}
		<-rest
		_ = cmd.Wait() // the registry was killed, so its exit status has no meaning
		_ = r.Close()
	}
	// The program prints its address when it begins to listen. If it cannot listen, it ends.
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
