package registry_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
)

// TestAttachedIfOfDenied has an attachment that the repository lists but does not let this client read. It must not
// count as missing: AttachedIf must read the others, and its error must name the denied one.
func TestAttachedIfOfDenied(t *testing.T) {
	t.Parallel()
	for name, ref := range map[string]string{
		"registry": testkit.Registry(t, true) + "/denied", "without referrers": testkit.Registry(t, false) + "/denied",
		"site": "oci:" + t.TempDir(), "site without a list": "oci:" + t.TempDir(),
	} {
		for _, part := range []string{"manifest", "payload"} {
			t.Run(name+", "+part, func(t *testing.T) {
				written := open(t, ref)
				subject := pushRandom(t, written, 64, 1)
				label := map[string]string{"kind": "plan"}
				var attached []v1.Descriptor
				for i := range 4 {
					d, err := written.Attach(t.Context(), subject, labelledType, fmt.Appendf(nil, "%s plan %d", part, i), label)
					if err != nil {
						t.Fatal(err)
					}
					attached = append(attached, d)
				}
				denied := attached[2].Digest.Hex
				if part == "payload" {
					denied = payloadOf(t, written, attached[2])
				}
				deny := func(w http.ResponseWriter, r *http.Request) bool {
					if strings.HasSuffix(r.URL.Path, denied) {
						w.WriteHeader(http.StatusForbidden)
						return true
					}
					return false
				}
				var repo *registry.Repository
				if folder, ok := strings.CutPrefix(ref, "oci:"); ok {
					if name == "site without a list" {
						removeLists(t, folder)
					}
					files := http.FileServer(http.Dir(folder))
					srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						if !deny(w, r) {
							files.ServeHTTP(w, r)
						}
					}))
					t.Cleanup(srv.Close)
					repo = open(t, "oci:"+srv.URL)
				} else {
					host, path, _ := strings.Cut(ref, "/")
					repo = open(t, startProxy(t, host, deny, nil)+"/"+path)
				}
				all, err := repo.AttachedIf(t.Context(), subject.Digest.String(), labelledType,
					func(b []byte) string { return string(b) }, label)
				var failed *registry.UnreadError
				if !errors.As(err, &failed) || !failed.IsDenied() || failed.IsCut() || !registry.Denied(err) ||
					!fault.Is(err, fault.Usage) {
					t.Fatalf("AttachedIf = %d payloads, %v (%v); want usage, with what is denied", len(all), err, fault.Of(err))
				}
				if list := failed.Unread(); len(all) != 3 || len(list) != 1 || list[0].Digest != attached[2].Digest {
					t.Errorf("AttachedIf = %q, unread %v; want three payloads, and %s unread", all, list, attached[2].Digest)
				}
			})
		}
	}
}

// payloadOf returns the digest of an attachment's payload in hex.
func payloadOf(t *testing.T, repo *registry.Repository, d v1.Descriptor) string {
	t.Helper()
	raw, err := repo.Manifest(t.Context(), d.Digest.String())
	var m v1.Manifest
	if err != nil || json.Unmarshal(raw, &m) != nil {
		t.Fatalf("read %s: %v", d.Digest, err)
	}
	return m.Layers[0].Digest.Hex
}

// removeLists removes the lists of referrers from the index of an image layout. Other programs write layouts without
// such lists.
func removeLists(t *testing.T, dir string) {
	t.Helper()
	file := filepath.Join(dir, "index.json")
	raw, err := os.ReadFile(file)
	var idx v1.IndexManifest
	if err == nil {
		err = json.Unmarshal(raw, &idx)
	}
	if err == nil {
		idx.Manifests = slices.DeleteFunc(idx.Manifests, func(d v1.Descriptor) bool { return d.MediaType.IsIndex() })
		raw, err = json.Marshal(idx)
	}
	if err == nil {
		err = os.WriteFile(file, raw, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}
