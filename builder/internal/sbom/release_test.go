package sbom_test

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	spdxjson "github.com/spdx/tools-golang/json"

	"github.com/prebake/prebake/builder/internal/sbom"
)

// TestRelease checks that a Go module that is in two programs is listed once, and that the list has its package URL.
func TestRelease(t *testing.T) {
	t.Parallel()
	module := sbom.Part{Name: "golang.org/x/sys", Version: "v0.1.0", PURL: "pkg:golang/golang.org/x/sys@v0.1.0"}
	whole := sbom.Whole{
		Name: "image-server-linux-amd64", Version: "v1", Digest: "sha256:" + strings.Repeat("d", 64), Purpose: "CONTAINER",
		Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.FixedZone("x", 3600)),
		Parts:   []sbom.Part{module, {Name: "server", Version: "v1", Digest: "sha256:" + strings.Repeat("e", 64)}, module},
	}
	raw, err := sbom.Release(whole)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := sbom.Release(whole); err != nil || !bytes.Equal(again, raw) {
		t.Errorf("Release = %s, %v; before it was %s", again, err, raw)
	}
	d, err := spdxjson.Read(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, p := range d.Packages {
		purl := ""
		for _, r := range p.PackageExternalReferences {
			purl += r.Locator
		}
		for _, c := range p.PackageChecksums {
			purl += c.Value[:1]
		}
		got[p.PackageName] = purl
	}
	want := map[string]string{"image-server-linux-amd64": "d", "golang.org/x/sys": module.PURL, "server": "e"}
	if diff := cmp.Diff(want, got); diff != "" || len(d.Packages) != len(want) {
		t.Errorf("%d packages (-want +got):\n%s", len(d.Packages), diff)
	}
	if d.CreationInfo.Created != "2026-01-02T02:04:05Z" {
		t.Errorf("the document's time is %s; want the release's time in UTC", d.CreationInfo.Created)
	}
	whole.Digest = "latest"
	if raw, err := sbom.Release(whole); err == nil {
		t.Errorf("Release of a tag = %s; want an error", raw)
	}
}
