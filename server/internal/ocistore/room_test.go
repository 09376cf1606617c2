package ocistore_test

import (
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"cuelabs.dev/go/oci/ociregistry"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/ocistore"
)

// TestReserve checks that a long write fails as soon as the disk has too little free space, and that its bytes are
// removed.
func TestReserve(t *testing.T) {
	t.Parallel()
	checks, full := 0, errors.New("the disk is full")
	dir := t.TempDir()
	s, err := ocistore.Open(dir, ocistore.Options{CheckFree: func() error {
		if checks++; checks > 1 { // at the first check, there is enough space
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
	if left, err := os.ReadDir(filepath.Join(dir, "uploads")); err != nil || len(left) != 0 {
		t.Errorf("after the refusal, uploads has %v, %v; want no bytes left", left, err)
	}
	if err := w.Close(); err != nil {
		t.Errorf("Close() after the refusal = %v", err)
	}
	if _, err := s.PushBlobChunkedResume(t.Context(), "a", w.ID(), -1, 0); !errors.Is(err,
		ociregistry.ErrBlobUploadUnknown) {
		t.Errorf("the refused upload is continued: %v; want that it is unknown", err)
	}
	checks = 0
	if w, err = s.PushBlobChunked(t.Context(), "a", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("x")); !errors.Is(err, full) {
		t.Errorf("Write() = %v; want that the disk is full", err)
	}
}

// TestFullDropsIdle checks that a full disk makes the registry remove the idle uploads of all callers. It must keep
// uploads that a request writes to.
func TestFullDropsIdle(t *testing.T) {
	t.Parallel()
	dir, now := t.TempDir(), time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	var full error
	is := map[string]string{} // the paths of the uploads, by name
	there := func(name string) bool {
		_, err := os.Stat(is[name])
		return err == nil
	}
	s, err := ocistore.Open(dir, ocistore.Options{Now: func() time.Time { return now }, CheckFree: func() error {
		if there("idle") {
			return full
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	var busy ociregistry.BlobWriter
	for name, age := range map[string]time.Duration{"idle": 11 * time.Minute, "fresh": 9 * time.Minute,
		"busy": 11 * time.Minute, "from before the start": 11 * time.Minute} {
		w, err := s.PushBlobChunked(t.Context(), "a", 0)
		if err != nil {
			t.Fatal(err)
		}
		is[name] = filepath.Join(dir, "uploads", w.ID())
		switch name {
		case "busy":
			busy = w
		case "from before the start":
			if err := w.Cancel(); err != nil { // the store does not know this upload, as after a restart
				t.Fatal(err)
			}
			if err := os.WriteFile(is[name], nil, 0o640); err != nil {
				t.Fatal(err)
			}
		default:
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chtimes(is[name], now.Add(-age), now.Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := errors.Join(busy.Close(), s.Close()); err != nil {
			t.Error(err)
		}
	})
	full = errors.New("the disk is full")
	w, err := s.PushBlobChunked(t.Context(), "a", 0)
	if err != nil {
		t.Fatalf("PushBlobChunked() beside an idle upload = %v; want room", err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"idle": false, "fresh": true, "busy": true, "from before the start": false} {
		if there(name) != want {
			t.Errorf("upload %s is there: %t; want %t", name, !want, want)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// TestOpenUploads checks that a caller may have only 64 open uploads. Uploads that ended or were deleted do not count.
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

// TestIdleUploads checks a caller that has the maximum number of uploads. A new upload replaces the oldest idle one. An
// upload that a request writes to is not idle.
func TestIdleUploads(t *testing.T) {
	t.Parallel()
	dir, began := t.TempDir(), time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	now := began.Add(10 * time.Minute)
	s, err := ocistore.Open(dir, ocistore.Options{Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	var all []ociregistry.BlobWriter
	for i := range 64 {
		w, err := s.PushBlobChunked(t.Context(), "a", 0)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, w)
		at := began.Add(time.Duration(i) * time.Second)
		if err := os.Chtimes(filepath.Join(dir, "uploads", w.ID()), at, at); err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Cleanup(func() {
		if err := errors.Join(all[0].Close(), s.Close()); err != nil {
			t.Error(err)
		}
	})
	begin := func(when string, accepted bool) {
		t.Helper()
		w, err := s.PushBlobChunked(t.Context(), "a", 0)
		if err == nil {
			err = w.Close()
		}
		if accepted && err != nil || !accepted && !errors.Is(err, ociregistry.ErrTooManyRequests) {
			t.Errorf("%s: PushBlobChunked() = %v; want accepted: %t", when, err, accepted)
		}
	}
	begin("no upload is idle", false)
	now = now.Add(2500 * time.Millisecond)
	begin("two are idle", true)
	begin("one is idle", true)
	begin("the idle ones are gone", false)
	for i, w := range all[:4] {
		_, err := os.Stat(filepath.Join(dir, "uploads", w.ID()))
		if gone := errors.Is(err, fs.ErrNotExist); gone != (i == 1 || i == 2) {
			t.Errorf("upload %d is gone: %t, %v; want that only 1 and 2 are", i, gone, err)
		}
	}
}

// TestUploadsWithoutFiles checks that uploads whose files are gone do not count towards the limit for ever.
func TestUploadsWithoutFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	var first ociregistry.BlobWriter // a request still writes to this upload
	for i := range 64 {
		w, err := s.PushBlobChunked(t.Context(), "a", 0)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = w
		} else if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if i < 3 {
			if err := os.Remove(filepath.Join(dir, "uploads", w.ID())); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i, want := range []error{nil, nil, ociregistry.ErrTooManyRequests} {
		w, err := s.PushBlobChunked(t.Context(), "a", 0)
		if !errors.Is(err, want) {
			t.Errorf("upload %d after two files are gone = %v; want %v", i, err, want)
		}
		if err == nil {
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestFullDuringUpload checks that the client gets status 507 if the disk is full, for a PATCH and for a PUT.
func TestFullDuringUpload(t *testing.T) {
	t.Parallel()
	var full error
	s := openWith(t, t.TempDir(), ocistore.Options{CheckFree: func() error { return full }})
	host := listen(t, s)
	for method, query := range map[string]string{"PATCH": "", "PUT": "?digest=" + sum("x")} {
		full = nil
		r := call(t, host, "POST", "/v2/a/b/blobs/uploads/", "")
		if r.StatusCode != http.StatusAccepted {
			t.Fatal(r.Status)
		}
		full = fault.New(fault.DiskFull, "1 MiB is left", "free space")
		if r := call(t, host, method, r.Header.Get("Location")+query, "x"); r.StatusCode != http.StatusInsufficientStorage {
			t.Errorf("%s with the disk full = %s; want 507", method, r.Status)
		}
	}
}
