// Package gcs runs fake-gcs-server, an emulator of Google Cloud Storage, for
// one test. Only test files import it. It refuses to stand in for Google's
// permissions: the emulator lets everybody do everything, and so a test of
// what is refused without rights has no place here.
package gcs

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// Tool is the emulator, pinned, for deploy/tool.sh.
const Tool = "github.com/fsouza/fake-gcs-server@v1.56.1"

// Env names the variable with the path of the program. Tests that need the
// emulator are skipped where it is not set.
const Env = "PREBAKE_FAKE_GCS"

// Server is a running emulator.
type Server struct {
	// Endpoint is what STORAGE_EMULATOR_HOST is set to: a URL.
	Endpoint string
}

// ports bounds how many ports are tried: one that was free a moment ago may be
// taken by the next.
const ports = 5

// Start runs an emulator, empty, that ends with the test.
func Start(t testing.TB) *Server {
	t.Helper()
	program := os.Getenv(Env)
	if program == "" {
		t.Skipf("%s is not set: want the path of fake-gcs-server, as `deploy/tool.sh %s` prints it", Env, Tool)
	}
	var err error
	for range ports {
		var address string
		if address, err = start(t, program); err == nil {
			return &Server{"http://" + address}
		}
	}
	t.Fatalf("start %s: %v", program, err)
	return nil
}

func start(t testing.TB, program string) (address string, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	address = l.Addr().String()
	if err := l.Close(); err != nil {
		return "", err
	}
	_, port, _ := net.SplitHostPort(address)
	// The public host is that of plain downloads, which have no API in their path.
	cmd := exec.Command(program, "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", port,
		"-public-host", address)
	cmd.Env = []string{"HOME=/nonexistent"}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	stop := func() error {
		kill := cmd.Process.Kill()
		_, drain := io.Copy(io.Discard, stderr)
		_ = cmd.Wait() // killed
		return errors.Join(kill, drain)
	}
	// It says so once it listens, or ends.
	var said []string
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		if strings.Contains(lines.Text(), "server started at") {
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = io.Copy(io.Discard, stderr)
			}()
			t.Cleanup(func() {
				if err := cmd.Process.Kill(); err != nil {
					t.Errorf("stop the emulator: %v", err)
				}
				<-done
				_ = cmd.Wait() // killed
			})
			return address, nil
		}
		said = append(said, lines.Text())
	}
	return "", errors.Join(fmt.Errorf("it ended and said %q", said), stop())
}

// Use points this process's Google Cloud Storage clients to the emulator until
// the test ends, and takes credentials away from them. A test that calls it
// cannot be parallel.
func (s *Server) Use(t testing.TB) {
	t.Helper()
	t.Setenv("STORAGE_EMULATOR_HOST", s.Endpoint)
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
	t.Setenv("CLOUDSDK_CONFIG", t.TempDir())
}

// Bucket makes an empty bucket.
func (s *Server) Bucket(t testing.TB, name string) {
	t.Helper()
	text, err := json.Marshal(map[string]string{"name": name})
	if err != nil {
		t.Fatal(err)
	}
	s.post(t, "/storage/v1/b?project=test", "application/json", text)
}

// Put stores an object, in place of one that has its name.
func (s *Server) Put(t testing.TB, bucket, name string, data []byte) {
	t.Helper()
	s.put(t, bucket, data, url.Values{"uploadType": {"media"}, "name": {name}})
}

// PutGzip stores an object that is stored compressed and meant available plain:
// gzipped data with a Content-Encoding.
func (s *Server) PutGzip(t testing.TB, bucket, name string, data []byte) {
	t.Helper()
	s.put(t, bucket, data, url.Values{"uploadType": {"media"}, "name": {name}, "contentEncoding": {"gzip"}})
}

func (s *Server) put(t testing.TB, bucket string, data []byte, q url.Values) {
	t.Helper()
	s.post(t, "/upload/storage/v1/b/"+url.PathEscape(bucket)+"/o?"+q.Encode(), "application/octet-stream", data)
}

func (s *Server) post(t testing.TB, path, kind string, data []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.Endpoint+path, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", kind)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatalf("emulator: %v", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("emulator: POST %s: %s %s %v", path, resp.Status, text, err)
	}
}
