package registry

import (
	"archive/tar"
	"bytes"
	"testing"
)

// FuzzScan checks the files that scan finds in an arbitrary tar. Each must lie inside the tar and have a name that a
// layout's file can have.
func FuzzScan(f *testing.F) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{
		{Typeflag: tar.TypeDir, Name: "blobs/"},
		{Typeflag: tar.TypeReg, Name: "./index.json", Size: 2},
		{Typeflag: tar.TypeReg, Name: "oci-layout", Size: 2, PAXRecords: map[string]string{"comment": "x"}},
		{Typeflag: tar.TypeReg, Name: "blobs/sha256/ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
			Size: 2, Format: tar.FormatGNU},
	} {
		if err := w.WriteHeader(&h); err != nil {
			f.Fatal(err)
		}
		if _, err := w.Write([]byte("{}")[:h.Size]); err != nil {
			f.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add(b.Bytes()[:1600])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		files, err := scan(bytes.NewReader(raw))
		if err != nil {
			if files != nil {
				t.Errorf("scan = %d files and %v; want one of the two", len(files), err)
			}
			return
		}
		for name, e := range files {
			if e.at < 0 || e.size < 0 || e.at+e.size > int64(len(raw)) || !layoutFile.MatchString(name) {
				t.Errorf("scan found %q at %+v of %d bytes", name, e, len(raw))
			}
		}
	})
}
