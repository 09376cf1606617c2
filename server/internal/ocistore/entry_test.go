package ocistore_test

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/prebake/prebake/server/internal/ocistore"
)

// TestDamagedEntries damages the entries that the registry keeps for an attached manifest. The list of attachments must
// stay the same, because the manifest itself has the same facts. If the manifest is damaged, too, the list must leave
// out only this one. The registry must still be able to delete it and to accept it again.
func TestDamagedEntries(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var log strings.Builder
	s := openWith(t, dir, ocistore.Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
	host := listen(t, s)
	subject := image(t)
	desc, err := partial.Descriptor(subject)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(reference(t, host, "a/x:1"), subject, options(t)...); err != nil {
		t.Fatal(err)
	}
	var attached []v1.Image
	for range 2 {
		img := mutate.Annotations(image(t), map[string]string{"verdict": "loaded"}).(v1.Image)
		img = mutate.Subject(img, *desc).(v1.Image)
		if err := remote.Write(reference(t, host, "a/x@"+digestOf(t, img).String()), img, options(t)...); err != nil {
			t.Fatal(err)
		}
		attached = append(attached, img)
	}
	list := func() (all []v1.Descriptor) {
		t.Helper()
		r := call(t, host, "GET", "/v2/a/x/referrers/"+desc.Digest.String(), "")
		raw, err := io.ReadAll(r.Body)
		var index v1.IndexManifest
		if err := errors.Join(err, json.Unmarshal(raw, &index)); err != nil || r.StatusCode != http.StatusOK {
			t.Fatalf("GET of the referrers = %s %s, %v; want 200", r.Status, raw, err)
		}
		return index.Manifests
	}
	before := list()
	if len(before) != 2 || before[0].Annotations["verdict"] != "loaded" {
		t.Fatalf("referrers = %+v; want 2 with annotations", before)
	}
	hash := digestOf(t, attached[0])
	manifest := "/v2/a/x/manifests/" + hash.String()
	repo := filepath.Join(dir, "repos/a/x")
	entries := []string{
		filepath.Join(repo, "_manifests", hash.Hex), filepath.Join(repo, "_referrers", desc.Digest.Hex, hash.Hex),
	}
	other, err := os.ReadFile(filepath.Join(repo, "_manifests", digestOf(t, attached[1]).Hex))
	if err != nil {
		t.Fatal(err)
	}
	write := func(file, content string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(repo, "_manifests", "notes.txt"), "not ours")
	write(filepath.Join(repo, "_referrers", desc.Digest.Hex, "notes.txt"), "not ours")
	for _, content := range []string{"", `{"mediaType`, "[]", string(other)} {
		for _, file := range entries {
			write(file, content)
		}
		for range 2 {
			if d := cmp.Diff(before, list()); d != "" {
				t.Errorf("entries with %q: referrers (-want +got):\n%s", content, d)
			}
		}
		if r := call(t, host, "GET", manifest, ""); r.StatusCode != http.StatusOK ||
			r.Header.Get("Content-Type") != string(before[0].MediaType) {
			t.Errorf("entries with %q: GET of the manifest = %s %s; want 200 and its type", content, r.Status,
				r.Header.Get("Content-Type"))
		}
	}
	if n := strings.Count(log.String(), "\n"); n != 3 {
		t.Errorf("the log has %d lines; want one for each damaged file of a list:\n%s", n, log.String())
	}
	flip(t, blobFile(dir, hash.Hex))
	want := before[1:]
	if before[0].Digest != hash {
		want = before[:1]
	}
	if d := cmp.Diff(want, list()); d != "" {
		t.Errorf("without the content: referrers (-want +got):\n%s", d)
	}
	if r := call(t, host, "GET", manifest, ""); r.StatusCode != http.StatusNotFound {
		t.Errorf("without the content: GET of the manifest = %s; want 404", r.Status)
	}
	if r := call(t, host, "DELETE", manifest, ""); r.StatusCode != http.StatusAccepted {
		t.Errorf("DELETE = %s; want 202", r.Status)
	}
	if err := remote.Write(reference(t, host, "a/x@"+hash.String()), attached[0], options(t)...); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, list()); d != "" {
		t.Errorf("after a push: referrers (-want +got):\n%s", d)
	}
}
