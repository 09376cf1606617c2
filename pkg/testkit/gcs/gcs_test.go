package gcs_test

import (
	"io"
	"net/http"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/gcs"
)

// TestEmulator checks that the API and a plain download return a stored object, and that two emulators share no
// objects.
func TestEmulator(t *testing.T) {
	t.Parallel()
	s, other := gcs.Start(t), gcs.Start(t)
	s.Bucket(t, "cos-tools")
	other.Bucket(t, "cos-tools")
	s.Put(t, "cos-tools", "17800.0.47/lakitu/kernel_commit", []byte("abc\n"))
	for _, row := range []struct {
		url  string
		code int
		text string
	}{
		{s.Endpoint + "/cos-tools/17800.0.47/lakitu/kernel_commit", http.StatusOK, "abc\n"},
		{s.Endpoint + "/storage/v1/b/cos-tools/o/17800.0.47%2Flakitu%2Fkernel_commit?alt=media", http.StatusOK, "abc\n"},
		{s.Endpoint + "/cos-tools/17800.0.47/lakitu/none", http.StatusNotFound, ""},
		{other.Endpoint + "/cos-tools/17800.0.47/lakitu/kernel_commit", http.StatusNotFound, ""},
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, row.url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != row.code || err != nil || row.text != "" && string(text) != row.text {
			t.Errorf("GET %s = %s %q, %v; want %d %q", row.url, resp.Status, text, err, row.code, row.text)
		}
	}
}
