package main

import (
	"archive/tar"
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// packBundle packs the folder of an image layout into a tar, and returns the path of the tar.
func packBundle(t *testing.T, dir string) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: rel, Mode: 0o644,
			Size: int64(len(raw))}); err != nil {
			return err
		}
		_, err = w.Write(raw)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "bundle.tar")
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestImport imports a bundle twice, which must succeed. Then it imports a bundle that also has a driver without a
// trusted signature, which must fail.
func TestImport(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	url, _, _ := start(t, dir)
	c := api.NewClient(url, secretOf(t, dir), nil)
	farm, stranger := testkit.NewKey(t), testkit.NewKey(t)
	pem := filepath.Join(t.TempDir(), "farm.pub")
	if err := os.WriteFile(pem, farm.PEM(t), 0o600); err != nil {
		t.Fatal(err)
	}
	driver := target.Driver{Version: "535.261.03", Flavour: target.Open}
	layout := t.TempDir()
	repo, err := registry.Open("oci:"+layout, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := testkit.NewSample(t, farm, testkit.SampleKernel("1"), driver, "")
	s.Publish(t, repo)
	args := func(file string) []string {
		return []string{"import", file, "--server", url, "--key", pem, "--token-file", filepath.Join(dir, "token")}
	}
	for range 2 {
		code, out, errs := run(t, args(packBundle(t, layout))...)
		if code != 0 || !strings.Contains(out, "imported") {
			t.Fatalf("import = %d\n%s%s\nwant 0, and what was imported", code, out, errs)
		}
	}
	r, err := c.Resolve(t.Context(),
		api.Question{BuildID: s.Kernel.BuildID, Board: s.Kernel.Board, Driver: driver.Version,
			Flavour: string(driver.Flavour)})
	if err != nil || r.State != api.Published || r.Digest != s.Digest || r.Repository != "/prebake/driver" {
		t.Errorf("Resolve = %+v, %v; want %s, published in /prebake/driver", r, err, s.Digest)
	}
	served, err := registry.Open(strings.TrimPrefix(url, "http://")+"/prebake/driver", registry.Options{Plain: true})
	if err != nil {
		t.Fatal(err)
	}
	bundles, err := served.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := farm.Verifier(t).Verify(bundles, s.Expect()); err != nil {
		t.Errorf("Verify of the driver on the server = %v; want nil", err)
	}

	foreign := testkit.NewSample(t, stranger, testkit.SampleKernel("2"), driver, "")
	foreign.Publish(t, repo)
	code, out, errs := run(t, args(packBundle(t, layout))...)
	if code != fault.Unverified.ExitCode() || !strings.Contains(errs, foreign.Digest) {
		t.Errorf("import of a stranger's driver = %d\n%s%s\nwant 4, and the driver named", code, out, errs)
	}
	if d, err := served.Resolve(t.Context(), foreign.Digest); !fault.Is(err, fault.NoArtifact) {
		t.Errorf("after that the server has %v, %v; want no such artifact", d.Digest, err)
	}
	if known, err := c.Artifacts(t.Context()); err != nil || len(known) != 1 {
		t.Errorf("after that the catalogue has %d artifacts, %v; want 1", len(known), err)
	}
	if code, _, errs := run(t, args(filepath.Join(t.TempDir(), "none.tar"))...); code != fault.NotFound.ExitCode() {
		t.Errorf("import of no file = %d %s; want 11", code, errs)
	}
	if code, _, errs := run(t, append(args(packBundle(t, layout)), "--repository", "elsewhere.example/x")...); code == 0 {
		t.Errorf("import into another registry = %d %s; want an error", code, errs)
	}
}
