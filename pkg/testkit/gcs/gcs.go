// Package gcs runs fake-gcs-server, an emulator of Google Cloud Storage, for one test. The emulator allows every
// request, so a test with it says nothing about permissions. Only test files import the package.
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

// Tool names the emulator and its version, as deploy/tool.sh expects it.
const Tool = "github.com/fsouza/fake-gcs-server@v1.56.1"

// Env is the environment variable with the path of the emulator. If the variable is not set, tests that need the
// emulator are skipped.
const Env = "PREBAKE_FAKE_GCS"

// Server is a running emulator.
type Server struct {
	// Endpoint is the URL of the emulator, for STORAGE_EMULATOR_HOST.
	Endpoint string
}

// ports is the number of ports that Start tries. Another process may take a free port before the emulator does.
const ports = 5

// Start runs an empty emulator until the test ends.
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
	// The public host is the host in the URLs of plain downloads. These URLs do not contain the API's path.
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
		_ = cmd.Wait() // the emulator was killed, so its exit status has no meaning
		return errors.Join(kill, drain)
	}
	// The emulator prints this text when it begins to listen. If it cannot listen, it ends.
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
				_ = cmd.Wait() // the emulator was killed, so its exit status has no meaning
			})
			return address, nil
		}
		said = append(said, lines.Text())
	}
	return "", errors.Join(fmt.Errorf("the emulator ended and printed %q", said), stop())
}

// Use makes the Google Cloud Storage clients of this process use the emulator, without credentials, until the test
// ends. The test cannot be parallel, because Use sets environment variables.
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

// Put stores an object. It replaces an object of the same name.
func (s *Server) Put(t testing.TB, bucket, name string, data []byte) {
	t.Helper()
	s.put(t, bucket, data, url.Values{"uploadType": {"media"}, "name": {name}})
}

// PutGzip stores gzip data with Content-Encoding: gzip, so that a plain download returns the uncompressed data.
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
