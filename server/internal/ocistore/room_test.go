package ocistore_test

import (
	"errors"
	"io"
	"net/http"
	"testing"

	"cuelabs.dev/go/oci/ociregistry"

	"github.com/prebake/prebake/server/internal/ocistore"
)

// TestReserve checks that a long write is refused once the disk has no room, and that an upload is not continued then.
func TestReserve(t *testing.T) {
	t.Parallel()
	checks, full := 0, errors.New("the disk is full")
	s, err := ocistore.Open(t.TempDir(), ocistore.Options{CheckFree: func() error {
		if checks++; checks > 1 { // there is room when the write begins
			return full
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	const size = 20 << 20
	desc := ociregistry.Descriptor{Digest: ociregistry.Digest(sum("x")), Size: size}
	if _, err := s.PushBlob(t.Context(), "a", desc, io.LimitReader(zeros{}, size)); !errors.Is(err, full) {
		t.Errorf("PushBlob(%d bytes) = %v; want that the disk is full", size, err)
	}
	checks = 0
	w, err := s.PushBlobChunked(t.Context(), "a", 0)
	if err != nil {
		t.Fatal(err)
	}
	checks = 0
	if _, err := w.Write([]byte("x")); err != nil {
		t.Errorf("Write() = %v; want room for the first bytes", err)
	}
	if n, err := io.Copy(w, io.LimitReader(zeros{}, size)); !errors.Is(err, full) || n > 16<<20 {
		t.Errorf("Write(%d bytes) = %d, %v; want that the disk is full after 16 MiB", size, n, err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	w, err = s.PushBlobChunkedResume(t.Context(), "a", w.ID(), w.Size(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("x")); !errors.Is(err, full) {
		t.Errorf("Write() to a continued upload = %v; want that the disk is full", err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// TestOpenUploads checks that the open uploads of a caller are bounded. Ended and deleted ones do not count.
func TestOpenUploads(t *testing.T) {
	t.Parallel()
	host := serve(t, t.TempDir())
	begin := func() *http.Response { return call(t, host, "POST", "/v2/a/b/blobs/uploads/", "") }
	var open []string
	for range 64 {
		r := begin()
		if r.StatusCode != http.StatusAccepted {
			t.Fatalf("upload %d = %s; want 202", len(open), r.Status)
		}
		open = append(open, r.Header.Get("Location"))
	}
	if r := begin(); r.StatusCode != http.StatusTooManyRequests {
		t.Errorf("one more = %s; want 429", r.Status)
	}
	if r := call(t, host, "PUT", open[0]+"?digest="+sum("x"), "x"); r.StatusCode != http.StatusCreated {
		t.Fatal(r.Status)
	}
	if r := call(t, host, "DELETE", open[1], ""); r.StatusCode != http.StatusNoContent {
		t.Fatal(r.Status)
	}
	for i, want := range []int{http.StatusAccepted, http.StatusAccepted, http.StatusTooManyRequests} {
		if r := begin(); r.StatusCode != want {
			t.Errorf("upload %d after two are gone = %s; want %d", i, r.Status, want)
		}
	}
}
