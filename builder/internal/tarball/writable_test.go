package tarball_test

import (
	"net/http"
	"net/http/httptest"
	"os"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

// TestCheckWriteBucket runs a server that answers as Google does. Path and bodies are those of
// https://cloud.google.com/storage/docs/json_api/v1/buckets/testIamPermissions. This test cannot use the emulator of
// the other tests, because the emulator allows everything.
func TestCheckWriteBucket(t *testing.T) {
	const kind = `"kind":"storage#testIamPermissionsResponse"`
	for _, row := range []struct {
		name, body string
		status     int
		want       fault.Kind
		ok         bool
	}{
		{"may create", `{` + kind + `,"permissions":["storage.objects.create"]}`, 200, 0, true},
		{"may only read", `{` + kind + `}`, 200, fault.PublishRefused, false},
		{"no such bucket", `{"error":{"code":404,"message":"The specified bucket does not exist."}}`, 404,
			fault.Usage, false},
		{"not logged in", `{"error":{"code":401,"message":"Anonymous caller does not have access"}}`, 401,
			fault.PublishRefused, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method != http.MethodGet || r.URL.Path != "/storage/v1/b/mine/iam/testPermissions" &&
					r.URL.Path != "/b/mine/iam/testPermissions" {
					t.Errorf("%s %s; want a question about permissions", r.Method, r.URL)
				}
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(row.status)
				if _, err := w.Write([]byte(row.body)); err != nil {
					t.Error(err)
				}
			}))
			defer server.Close()
			t.Setenv("STORAGE_EMULATOR_HOST", server.URL)
			err := openBucket(t, "gs://mine/drivers").CheckWrite(t.Context())
			if row.ok != (err == nil) || err != nil && (fault.Of(err) != row.want || fault.Hint(err) == "") {
				t.Errorf("CheckWrite() = %v (%v), hint %q; want ok %t, kind %v",
					err, fault.Of(err), fault.Hint(err), row.ok, row.want)
			}
		})
	}
}

// TestCheckWriteFolder checks a folder that this user may write. Then it removes the folder and checks again.
func TestCheckWriteFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	b := openBucket(t, "file://"+dir)
	if err := b.CheckWrite(t.Context()); err != nil {
		t.Errorf("CheckWrite() = %v in a folder of this user", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := b.CheckWrite(t.Context()); err == nil {
		t.Error("CheckWrite() = nil for a folder that is gone")
	}
}
