package ocistore_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"cuelabs.dev/go/oci/ociregistry"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
)

// TestCrashLeftovers checks that the files which a killed process left behind are removed or do no harm.
func TestCrashLeftovers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	host := serve(t, dir)
	img := image(t)
	if err := remote.Write(reference(t, host, "prebake/driver:one"), img, options(t)...); err != nil {
		t.Fatal(err)
	}
	// The process was killed after it wrote the entry in the list of referrers, and before it wrote the manifest.
	subject := digestOf(t, img).Hex
	ghost := strings.Repeat("1", 64)
	entry, err := json.Marshal(ociregistry.Descriptor{MediaType: "x", Digest: digest.Digest("sha256:" + ghost), Size: 1})
	if err != nil {
		t.Fatal(err)
	}
	refs := filepath.Join(dir, "repos/prebake/driver/_referrers", subject)
	if err := os.MkdirAll(refs, 0o750); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		filepath.Join(refs, ghost):        entry,
		filepath.Join(dir, "tmp", "half"): []byte("half a blob"),
	} {
		if err := os.WriteFile(name, content, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	host = serve(t, dir)
	all, err := remote.Referrers(reference(t, host, "prebake/driver@sha256:"+subject).(name.Digest),
		remote.WithContext(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	if m, err := all.IndexManifest(); err != nil || len(m.Manifests) != 0 {
		t.Errorf("referrers = %+v, %v; want none, since the manifest was never stored", m, err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "tmp")); err != nil || len(left) != 0 {
		t.Errorf("tmp holds %v, %v; want nothing", left, err)
	}
}

func TestConcurrentPushes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	host := serve(t, dir)
	img := image(t)
	var wait sync.WaitGroup
	for i := range 8 {
		wait.Go(func() {
			if err := remote.Write(reference(t, host, fmt.Sprintf("prebake/driver:t%d", i%2)), img, options(t)...); err != nil {
				t.Errorf("push %d = %v", i, err)
			}
		})
	}
	// Push four images to the same create-only tag at the same time. Only one of them may get the tag.
	var mu sync.Mutex
	won := 0
	for range 4 {
		other := image(t)
		wait.Go(func() {
			err := remote.Write(reference(t, host, "prebake/driver:race"), other, options(t)...)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else if statusOf(err) != http.StatusForbidden {
				t.Errorf("race = %v; want 403", err)
			}
		})
	}
	wait.Wait()
	if won != 1 {
		t.Errorf("%d images won the tag; want 1", won)
	}
	blobs := 0
	err := filepath.WalkDir(filepath.Join(dir, "blobs"), func(_ string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			blobs++
		}
		return err
	})
	if want := 5 + 4*5; err != nil || blobs > want { // 3 layers, config, manifest; the other images may have left blobs
		t.Errorf("%d blobs, %v; want at most %d", blobs, err, want)
	}
}

func TestOneWriterPerUpload(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	ctx := context.WithoutCancel(t.Context())
	w, err := s.PushBlobChunked(ctx, "a", 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.PushBlobChunkedResume(ctx, "a", w.ID(), -1, 0); !errors.Is(err, ociregistry.ErrBlobUploadInvalid) {
		t.Errorf("a second writer = %v; want a refusal", err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := s.PushBlobChunkedResume(ctx, "a", w.ID(), -1, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Cancel(); err != nil {
		t.Error(err)
	}
	for range 2 { // the first refusal must not keep the upload locked
		if _, err := s.PushBlobChunkedResume(ctx, "a", w.ID(), -1, 0); !errors.Is(err, ociregistry.ErrBlobUploadUnknown) {
			t.Errorf("a cancelled upload = %v; want unknown", err)
		}
	}
}
