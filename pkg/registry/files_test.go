package registry_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
)

const kindFiles = "application/vnd.test.files"

// filesLayout makes an artifact of files, and returns its digest. Each file has the content "text". The file "lost" has
// no blob.
func filesLayout(t testing.TB, names ...string) (*registry.Repository, string) {
	t.Helper()
	body := "text"
	var layers []v1.Descriptor
	for _, name := range names {
		text := body
		if name == "lost" {
			text = "gone"
		}
		hash, err := v1.NewHash(digestOf([]byte(text)))
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, registry.FileDescriptor(name, "text/plain", hash, int64(len(text))))
	}
	manifest, config, err := registry.FilesManifest(kindFiles, layers)
	if err != nil {
		t.Fatal(err)
	}
	at := func(raw []byte) entry {
		return file("blobs/sha256/"+strings.TrimPrefix(digestOf(raw), "sha256:"), string(raw))
	}
	return open(t, "oci-archive:"+pack(t, file("oci-layout", `{"imageLayoutVersion":"1.0.0"}`),
		file("index.json", `{"schemaVersion":2,"manifests":[]}`),
		at(manifest), at(config), at([]byte(body)))), digestOf(manifest)
}

// TestSaveFiles checks that SaveFiles writes the files, and that it writes nothing outside its folder.
func TestSaveFiles(t *testing.T) {
	t.Parallel()
	repo, digest := filesLayout(t, "a.json", "targets/b.json")
	dir := filepath.Join(t.TempDir(), "new")
	if names, err := registry.SaveFiles(t.Context(), repo, digest, kindFiles, dir); err != nil ||
		!slices.Equal(names, []string{"a.json", "targets/b.json"}) {
		t.Fatalf("SaveFiles = %q, %v; want both", names, err)
	}
	if raw, err := os.ReadFile(filepath.Join(dir, "targets/b.json")); err != nil || string(raw) != "text" {
		t.Errorf("it wrote %q, %v; want the text", raw, err)
	}
	if _, err := registry.SaveFiles(t.Context(), repo, digest, kindFiles, dir); !fault.Is(err, fault.Usage) {
		t.Errorf("SaveFiles again = %v; want kind usage", err)
	}
	if _, err := registry.SaveFiles(t.Context(), repo, digest, "application/vnd.test.other", t.TempDir()); !fault.Is(err,
		fault.Unverified) {
		t.Errorf("SaveFiles of another type = %v; want kind unverified", err)
	}
	for _, name := range []string{"../x", "/etc/x", "a/../../x", ".", "", "a//b", "fine", "fine/x"} {
		repo, digest := filesLayout(t, "fine", name)
		dir := t.TempDir()
		if _, err := registry.SaveFiles(t.Context(), repo, digest, kindFiles, dir); !fault.Is(err, fault.Unverified) {
			t.Errorf("SaveFiles with %q = %v; want kind unverified", name, err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Errorf("SaveFiles with %q left %v, %v; want nothing", name, left, err)
		}
	}
}

// TestSaveFilesInTheWay checks that SaveFiles writes no file at all if one of the files cannot be written.
func TestSaveFilesInTheWay(t *testing.T) {
	t.Parallel()
	outside := t.TempDir()
	for name, row := range map[string]struct {
		last string // name of the last of the artifact's three files
		// setUp fills the folder before SaveFiles is called.
		setUp func(dir string) error
		kind  fault.Kind
	}{
		"the last file": {"z",
			func(dir string) error { return os.WriteFile(filepath.Join(dir, "z"), nil, 0o600) }, fault.Usage},
		"a file for a folder": {"z/z",
			func(dir string) error { return os.WriteFile(filepath.Join(dir, "z"), nil, 0o600) }, fault.Usage},
		"a folder for the last file": {"z", func(dir string) error { return os.Mkdir(filepath.Join(dir, "z"), 0o700) },
			fault.Usage},
		"a link that leads nowhere": {"z",
			func(dir string) error { return os.Symlink("nowhere", filepath.Join(dir, "z")) }, fault.Usage},
		"a link that leads out": {"z/z",
			func(dir string) error { return os.Symlink(outside, filepath.Join(dir, "z")) }, fault.Usage},
		"no file, and the last is lost": {"lost", func(string) error { return nil }, fault.NoArtifact},
	} {
		repo, digest := filesLayout(t, "a", "sub/b", row.last)
		dir := t.TempDir()
		if err := row.setUp(dir); err != nil {
			t.Fatal(err)
		}
		before := filesIn(t, dir)
		if names, err := registry.SaveFiles(t.Context(), repo, digest, kindFiles, dir); !fault.Is(err, row.kind) ||
			names != nil {
			t.Errorf("SaveFiles with %s in the way = %q, %v (%v); want kind %v", name, names, err, fault.Of(err), row.kind)
		}
		if got := filesIn(t, dir); !slices.Equal(got, before) {
			t.Errorf("SaveFiles with %s in the way left %q; want %q", name, got, before)
		}
	}
	if got := filesIn(t, outside); len(got) > 0 {
		t.Errorf("SaveFiles wrote %q out of its folder", got)
	}
}

// filesIn lists the files and folders below dir, except the folders that SaveFiles makes for a file.
func filesIn(t testing.TB, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && (!d.IsDir() || filepath.Base(path) == "z") {
			names = append(names, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}
