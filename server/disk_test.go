package main

import (
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestFullDisk starts a server with a reserve that is larger than the free space. The server must answer nodes but
// refuse uploads, and /readyz?for=write must fail. No answer may show a path of the server's machine.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	const token = "0123456789abcdef"
	url, _, _ := start(t, dir, "--token", token, "--reserve", "1000000000") // in MiB; about a petabyte
	for _, row := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/readyz", http.StatusOK},
		{"GET", "/readyz?for=write", http.StatusServiceUnavailable},
		{"POST", "/v2/prebake/driver/blobs/uploads/", http.StatusInsufficientStorage},
		{"GET", "/v1/kernels", http.StatusOK},
		{"GET", "/healthz", http.StatusOK},
	} {
		req, err := http.NewRequestWithContext(t.Context(), row.method, url+row.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		if cerr := resp.Body.Close(); err != nil || cerr != nil {
			t.Fatal(err, cerr)
		}
		if resp.StatusCode != row.status || strings.Contains(string(text), dir) {
			t.Errorf("%s %s = %s %s; want %d without a path", row.method, row.path, resp.Status, text, row.status)
		}
	}
}

// TestDiskMeasuredAgain checks that CheckFree measures a disk again if it was full a moment ago. Meanwhile, the removal
// of uploads may have freed space.
func TestDiskMeasuredAgain(t *testing.T) {
	t.Parallel()
	d := &disk{dir: t.TempDir(), reserve: 1, at: time.Now()} // the last measurement has just found no free byte
	if err := d.CheckFree(); err != nil {
		t.Errorf("CheckFree() with free space = %v; want nil", err)
	}
}

// TestCreateOnlyPatterns checks in which repositories tags cannot be moved. The tags that older clients use for
// referrers, such as sha256-DIGEST, can always be moved.
func TestCreateOnlyPatterns(t *testing.T) {
	t.Parallel()
	s := settings{CreateOnly: []string{"prebake/*", "mine/a"}}
	fallback := "sha256-" + strings.Repeat("0", 64)
	for _, row := range []struct {
		repo, tag string
		want      bool
	}{
		{"prebake/driver", "v1", true}, {"mine/a", "v1", true}, {"mine/b", "v1", false}, {"prebake/a/b", "v1", false},
		{"prebake/driver", fallback, false}, {"prebake/driver", fallback + ".sig", false},
		{"prebake/driver", strings.Replace(fallback, "256", "512", 1), false}, {"prebake/driver", fallback + "-v1", true},
	} {
		if got := s.createOnly(row.repo, row.tag); got != row.want {
			t.Errorf("createOnly(%s, %.12s) = %t; want %t", row.repo, row.tag, got, row.want)
		}
	}
}
