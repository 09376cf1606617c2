package tarball_test

import (
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/gcs"
)

// TestCheckWriteBucket runs a server that answers as Google does, because the emulator does not know permissions. The
// path and the bodies are from https://cloud.google.com/storage/docs/json_api/v1/buckets/testIamPermissions.
func TestCheckWriteBucket(t *testing.T) {
	const kind = `"kind":"storage#testIamPermissionsResponse"`
	for _, row := range []struct {
		name, body string
		status     int
		want       fault.Kind
		ok         bool
	}{
		{"all permissions", `{` + kind + `,"permissions":["storage.objects.create","storage.objects.delete",
			"storage.objects.get","storage.objects.list"]}`, 200, 0, true},
		{"role objectCreator", `{` + kind + `,"permissions":["storage.objects.create"]}`, 200, fault.PublishRefused, false},
		{"may only read", `{` + kind + `}`, 200, fault.PublishRefused, false},
		{"no such bucket", `{"error":{"code":404,"message":"The specified bucket does not exist."}}`, 404,
			fault.Usage, false},
		{"not logged in", `{"error":{"code":401,"message":"Anonymous caller does not have access"}}`, 401,
			fault.PublishRefused, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method != http.MethodGet || !strings.HasPrefix(r.URL.Path, "/storage/v1/b/mine/") &&
					!strings.HasPrefix(r.URL.Path, "/b/mine/") {
					t.Errorf("%s %s; want a question about the bucket", r.Method, r.URL)
				}
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(row.status)
				if _, err := w.Write([]byte(row.body)); err != nil {
					t.Error(err)
				}
			}))
			defer server.Close()
			t.Setenv("STORAGE_EMULATOR_HOST", server.URL)
			err := tarball.CheckWrite(t.Context(), "gs://mine/drivers")
			if row.ok != (err == nil) || err != nil && (fault.Of(err) != row.want || fault.Hint(err) == "") {
				t.Errorf("CheckWrite() = %v (%v), hint %q; want ok %t, kind %v",
					err, fault.Of(err), fault.Hint(err), row.ok, row.want)
			}
		})
	}
}

// TestCheckWriteEmulator checks that CheckWrite accepts a bucket of the emulator, and refuses a bucket that does not
// exist.
func TestCheckWriteEmulator(t *testing.T) {
	server := gcs.Start(t)
	server.Use(t)
	server.Bucket(t, "mine")
	if err := tarball.CheckWrite(t.Context(), "gs://mine/drivers"); err != nil {
		t.Errorf("CheckWrite() = %v", err)
	}
	if err := tarball.CheckWrite(t.Context(), "gs://none/drivers"); !fault.Is(err, fault.Usage) {
		t.Errorf("CheckWrite() = %v for a bucket that does not exist; want usage", err)
	}
}

// TestCheckWriteFolder checks that CheckWrite makes no folder, and that it refuses a folder to which nobody can write.
func TestCheckWriteFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	missing := filepath.Join(dir, "a", "b")
	if err := tarball.CheckWrite(t.Context(), "file://"+missing); err != nil {
		t.Errorf("CheckWrite() = %v for a folder that can be made", err)
	}
	if _, err := os.Stat(filepath.Dir(missing)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("CheckWrite() made a folder: %v", err)
	}
	file := filepath.Join(dir, "file")
	write(t, file, "x")
	if err := tarball.CheckWrite(t.Context(), "file://"+file+"/below"); !fault.Is(err, fault.PublishRefused) ||
		fault.Hint(err) == "" {
		t.Errorf("CheckWrite() = %v, hint %q below a file; want a refusal", err, fault.Hint(err))
	}
	// Root may write to every folder. So the test replaces the folder by a link to itself, which even root cannot open.
	for _, closed := range []string{"", ".prebake", ".prebake/lock", ".prebake/part"} {
		dest := filepath.Join(t.TempDir(), "bucket")
		openBucket(t, "file://"+dest)
		if err := tarball.CheckWrite(t.Context(), "file://"+dest); err != nil {
			t.Errorf("CheckWrite() = %v for a folder of this user", err)
		}
		at := filepath.Join(dest, closed)
		if err := errors.Join(os.RemoveAll(at), os.Symlink(at, at)); err != nil {
			t.Fatal(err)
		}
		if err := tarball.CheckWrite(t.Context(), "file://"+dest); !fault.Is(err, fault.PublishRefused) {
			t.Errorf("CheckWrite() = %v, where %q cannot be written; want a refusal", err, closed)
		}
	}
}
