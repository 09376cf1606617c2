package cossrc_test

import (
	"crypto/md5"
	"fmt"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

const (
	signedVersion = "535.261.03"
	newArchive    = "extensions/gpu/nvidia-drivers-" + signedVersion + "-signature.tar.gz"
	oldArchive    = "extensions/gpu/" + signedVersion + ".signature.tar.gz"
)

// TestSignatures checks the names, new and old, that Google gave to module signatures and signed drivers, in both
// layouts of the bucket.
func TestSignatures(t *testing.T) {
	t.Parallel()
	const build, legacy = "17800.0.9/lakitu/", "17800.0.9/"
	wrong := fmt.Appendf(nil, "%x", md5.Sum([]byte("other")))
	for _, row := range []struct {
		name    string
		board   string
		objects map[string][]byte
		archive string // content of the archive that must be found; "" means none
		root    string
		driver  string
		kind    fault.Kind // kind of the error that both calls must return; 0 means none
	}{
		{name: "nothing", board: "lakitu"},
		{name: "this layout", board: "lakitu", archive: "new", root: "root", driver: "tgz", objects: map[string][]byte{
			build + newArchive: []byte("new"), build + oldArchive: []byte("old"), build + "trusted_key.pem": []byte("root"),
			build + "nvidia-drivers-" + signedVersion + ".tgz": []byte("tgz")}},
		{name: "the older layout and name", board: "lakitu", archive: "old", driver: "tgz", objects: map[string][]byte{
			legacy + oldArchive: []byte("old"), legacy + "nvidia-drivers-" + signedVersion + ".tgz": []byte("tgz")}},
		{name: "of another board", board: "lakitu-arm64",
			objects: map[string][]byte{build + newArchive: []byte("new"), legacy + oldArchive: []byte("old")}},
		{name: "damaged", board: "lakitu", kind: fault.Checksum, objects: map[string][]byte{
			build + newArchive: []byte("new"), build + newArchive + ".md5": wrong,
			build + "nvidia-drivers-" + signedVersion + ".tgz":     []byte("tgz"),
			build + "nvidia-drivers-" + signedVersion + ".tgz.md5": wrong}},
	} {
		root := t.TempDir()
		put(t, root, row.objects)
		bucket, cache := openEmpty(t, "file://"+root)
		kernel := target.Kernel{BuildID: "17800.0.9", Board: row.board}
		s, err := cossrc.FetchSignatures(t.Context(), bucket, cache, kernel, signedVersion)
		switch {
		case row.kind != 0:
			if !fault.Is(err, row.kind) {
				t.Errorf("%s: FetchSignatures = %v; want %v", row.name, err, row.kind)
			}
		case err != nil || (s == nil) != (row.archive == ""):
			t.Errorf("%s: FetchSignatures = %+v, %v; want archive %q", row.name, s, err, row.archive)
		case s != nil:
			want := []string{row.archive, row.root}
			if diff := cmp.Diff(want, []string{string(s.Archive), string(s.TrustedKey)}); diff != "" ||
				(len(s.Materials) == 2) != (row.root != "") {
				t.Errorf("%s: FetchSignatures has the materials %+v; archive and root certificate (-want +got):\n%s", row.name,
					s.Materials, diff)
			}
		}
		d, err := cossrc.FetchSignedDriver(t.Context(), bucket, cache, kernel, signedVersion, nil)
		switch {
		case row.kind != 0 || row.driver == "":
			want := fault.InputMissing
			if row.kind != 0 {
				want = row.kind
			}
			if !fault.Is(err, want) || fault.Hint(err) == "" {
				t.Errorf("%s: FetchSignedDriver = %v, hint %q; want %v", row.name, err, fault.Hint(err), want)
			}
		case err != nil:
			t.Errorf("%s: FetchSignedDriver = %v", row.name, err)
		default:
			if got, err := os.ReadFile(d.Archive); err != nil || string(got) != row.driver || string(d.TrustedKey) != row.root ||
				(len(d.Materials) == 2) != (row.root != "") {
				t.Errorf("%s: FetchSignedDriver = %q, %v, %+v; want %q", row.name, got, err, d, row.driver)
			}
		}
	}
}
