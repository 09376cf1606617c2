package archive_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

type entry struct {
	name string
	kind byte
	mode int64
	body string // content, or the target of a link
}

func makeTar(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Mode: e.mode, Uid: 1234, Gid: 5678, Uname: "builder"}
		if e.kind == tar.TypeReg {
			h.Size = int64(len(e.body))
		} else {
			h.Linkname = e.body
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if e.kind == tar.TypeReg {
			if _, err := io.WriteString(w, e.body); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func compress(t testing.TB, format archive.Format, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser
	var err error
	switch format {
	case archive.Plain:
		return data
	case archive.Gzip:
		w = gzip.NewWriter(&b)
	case archive.XZ:
		w, err = xz.NewWriter(&b)
	case archive.Zstd:
		w, err = zstd.NewWriter(&b)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func unpack(t testing.TB, data []byte, o archive.Options) (map[string]string, archive.Stats, error) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tree")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	stats, err := archive.Unpack(t.Context(), bytes.NewReader(data), root, o)
	if entries, rerr := os.ReadDir(filepath.Dir(dir)); rerr != nil || len(entries) != 1 {
		t.Errorf("Unpack left %v beside its folder, %v", entries, rerr)
	}
	return listTree(t, dir), stats, err
}

// listTree maps the path of each entry to its mode and its content or target.
func listTree(t testing.TB, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		var body string
		switch {
		case d.Type() == fs.ModeSymlink:
			body, err = os.Readlink(path)
			got[path[len(dir)+1:]] = "-> " + body
			return err
		case d.Type().IsRegular():
			b, rerr := os.ReadFile(path)
			err, body = rerr, " "+string(b)
		}
		got[path[len(dir)+1:]] = fi.Mode().String() + body
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestUnpack(t *testing.T) {
	t.Parallel()
	data := makeTar(t,
		entry{"./", tar.TypeDir, 0o700, ""},
		entry{"./bin/", tar.TypeDir, 0o2700, ""},
		entry{"./bin/tool", tar.TypeReg, 0o4711, "run"},
		entry{"./lib/deep/a.h", tar.TypeReg, 0o400, "a"}, // the archive has no entry for its folders
		entry{"./lib/b.h", tar.TypeSymlink, 0o777, "deep/a.h"},
		entry{"./lib/deep/up", tar.TypeSymlink, 0o777, "../../bin/tool"},
		entry{"./lib/gone", tar.TypeSymlink, 0o777, "not/there"},
		entry{"./bin/tool-1", tar.TypeLink, 0o755, "./bin/tool"},
		entry{"./bin/", tar.TypeDir, 0o755, ""}, // a second entry for the same folder
	)
	want := map[string]string{
		"bin": "drwxr-xr-x", "bin/tool": "-rwxr-xr-x run", "bin/tool-1": "-rwxr-xr-x run",
		"lib": "drwxr-xr-x", "lib/deep": "drwxr-xr-x", "lib/deep/a.h": "-rw-r--r-- a",
		"lib/b.h": "-> deep/a.h", "lib/deep/up": "-> ../../bin/tool", "lib/gone": "-> not/there",
	}
	// Unpack makes eleven things: the archive has nine entries, and two more folders have no entry.
	for most, ok := range map[int]bool{11: true, 10: false} {
		if _, _, err := unpack(t, data, archive.Options{Entries: most}); (err == nil) != ok {
			t.Errorf("Unpack with at most %d entries = %v; want success: %t", most, err, ok)
		}
	}
	for _, format := range []archive.Format{archive.Plain, archive.Gzip, archive.XZ, archive.Zstd} {
		t.Run(string(format), func(t *testing.T) {
			t.Parallel()
			got, stats, err := unpack(t, compress(t, format, data), archive.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("tree (-want +got):\n%s", diff)
			}
			if want := (archive.Stats{Format: format, Files: 3, Links: 3, Folder: 3, Bytes: 4}); stats != want {
				t.Errorf("stats = %+v; want %+v", stats, want)
			}
		})
	}
}

func TestUnpackTar(t *testing.T) {
	t.Parallel()
	data := makeTar(t, entry{"d/", tar.TypeDir, 0o755, ""}, entry{"d/a", tar.TypeReg, 0o755, "x"})
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	want := archive.Stats{Format: archive.Plain, Files: 1, Folder: 1, Bytes: 1}
	if got, err := archive.UnpackTar(t.Context(), bytes.NewReader(data), root, archive.Options{}); err != nil ||
		got != want {
		t.Errorf("UnpackTar(tar) = %+v, %v; want %+v", got, err, want)
	}
	packed := bytes.NewReader(compress(t, archive.Gzip, data))
	if _, err := archive.UnpackTar(t.Context(), packed, root, archive.Options{}); !fault.Is(err, fault.Unverified) {
		t.Errorf("UnpackTar(tar.gz) = %v; want %v", err, fault.Unverified)
	}
}

func TestUnpackRefuses(t *testing.T) {
	t.Parallel()
	file := func(name string) entry { return entry{name, tar.TypeReg, 0o644, "x"} }
	link := func(name, target string) entry { return entry{name, tar.TypeSymlink, 0o777, target} }
	rows := []struct {
		name    string
		entries []entry
		o       archive.Options
	}{
		{"absolute name", []entry{file("/etc/passwd")}, archive.Options{}},
		{"dot dot name", []entry{file("a/../../b")}, archive.Options{}},
		{"dot dot inside", []entry{file("a/../b")}, archive.Options{}},
		{"long name", []entry{file(strings.Repeat("a/", 600) + "a")}, archive.Options{}},
		{"long part", []entry{file(strings.Repeat("a", 256))}, archive.Options{}},
		{"root is a file", []entry{file(".")}, archive.Options{}},
		{"absolute link", []entry{link("a", "/etc/passwd")}, archive.Options{}},
		{"link up", []entry{link("a", "../x")}, archive.Options{}},
		{"link up from deep", []entry{link("d/e/a", "../../../x")}, archive.Options{}},
		{"link climbs out through a link", []entry{link("d/e/top", "../.."), link("d/e/a", "top/../x")}, archive.Options{}},
		{"link with .. behind a name", []entry{link("a", "b/../../x")}, archive.Options{}},
		{"empty link", []entry{link("a", "")}, archive.Options{}},
		{"file through a link", []entry{{"d/", tar.TypeDir, 0o755, ""}, link("l", "d"), file("l/x")}, archive.Options{}},
		{"link through a link", []entry{{"d/e/", tar.TypeDir, 0o755, ""}, link("l", "d/e"), link("l/x", "../..")},
			archive.Options{}},
		{"folder over a link", []entry{link("l", "d"), {"l/", tar.TypeDir, 0o755, ""}}, archive.Options{}},
		{"file twice", []entry{file("a"), file("a")}, archive.Options{}},
		{"file over a link", []entry{link("a", "b"), file("a")}, archive.Options{}},
		{"link over a file", []entry{file("a"), link("a", "b")}, archive.Options{}},
		{"hard link out", []entry{{"a", tar.TypeLink, 0o644, "/etc/passwd"}}, archive.Options{}},
		{"hard link up", []entry{{"a", tar.TypeLink, 0o644, "../b"}}, archive.Options{}},
		{"hard link to nothing", []entry{{"a", tar.TypeLink, 0o644, "b"}}, archive.Options{}},
		{"hard link to a link", []entry{link("l", "x"), {"a", tar.TypeLink, 0o644, "l"}}, archive.Options{}},
		{"hard link to a folder", []entry{{"d/", tar.TypeDir, 0o755, ""}, {"a", tar.TypeLink, 0o644, "d"}},
			archive.Options{}},
		{"device", []entry{{"a", tar.TypeChar, 0o644, ""}}, archive.Options{}},
		{"block device", []entry{{"a", tar.TypeBlock, 0o644, ""}}, archive.Options{}},
		{"pipe", []entry{{"a", tar.TypeFifo, 0o644, ""}}, archive.Options{}},
		{"too many entries", []entry{file("a"), file("b"), file("c")}, archive.Options{Entries: 2}},
		{"too many implied folders", []entry{file("a/b/c/d")}, archive.Options{Entries: 3}},
		{"too many implied folders of a link", []entry{link("a/b/c", "x")}, archive.Options{Entries: 2}},
		{"too many bytes", []entry{file("a"), file("b"), file("c")}, archive.Options{Bytes: 2}},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			got, _, err := unpack(t, makeTar(t, r.entries...), r.o)
			if !fault.Is(err, fault.Unverified) {
				t.Errorf("Unpack(%v) = %v; want an unverified error", r.entries, err)
			}
			for name, what := range got {
				if strings.HasPrefix(what, "-> /") || strings.HasPrefix(what, "-> ..") && !strings.Contains(name, "/") {
					t.Errorf("Unpack left %s %s", name, what)
				}
			}
		})
	}
}

func TestUnpackDamaged(t *testing.T) {
	t.Parallel()
	data := makeTar(t, entry{"a", tar.TypeReg, 0o644, strings.Repeat("payload ", 9000)})
	for _, format := range []archive.Format{archive.Plain, archive.Gzip, archive.XZ, archive.Zstd} {
		whole := compress(t, format, data)
		_, _, err := unpack(t, whole[:len(whole)/2], archive.Options{})
		if !fault.Is(err, fault.Unverified) || fault.Hint(err) == "" {
			t.Errorf("half a %s archive: %v, hint %q; want an unverified error with a hint", format, err, fault.Hint(err))
		}
	}
	for _, bad := range []string{"", "MZ not an archive", strings.Repeat("\x00", 1024)} {
		if _, _, err := unpack(t, []byte(bad), archive.Options{}); !fault.Is(err, fault.Unverified) {
			t.Errorf("Unpack(%.10q) = %v; want an unverified error", bad, err)
		}
	}
}

func TestUnpackBoundsXZDictionary(t *testing.T) {
	t.Parallel()
	whole := compress(t, archive.XZ, makeTar(t, entry{"a", tar.TypeReg, 0o644, "x"}))
	for i := 14; i < 24; i++ { // in an xz block header, the dictionary's size follows filter ID 0x21 and property size 1
		if whole[i] == 0x21 && whole[i+1] == 1 {
			whole[i+2] = 40
			break
		}
	}
	_, _, err := unpack(t, whole, archive.Options{})
	if !fault.Is(err, fault.Unverified) || !strings.Contains(err.Error(), "dictionary") {
		t.Errorf("Unpack of a 4 GiB dictionary = %v; want a refusal", err)
	}
	tool := installed.Program(t, "xz")
	// The program xz first compares the header with its checksum, the header's last four bytes. So the test corrects it.
	header := whole[12 : 12+4*(int(whole[12])+1)]
	binary.LittleEndian.PutUint32(header[len(header)-4:], crc32.ChecksumIEEE(header[:len(header)-4]))
	_, _, err = unpack(t, whole, archive.Options{XZTool: tool})
	if !fault.Is(err, fault.Unverified) || !strings.Contains(err.Error(), "emory") {
		t.Errorf("Unpack of a 4 GiB dictionary by %s = %v; want a refusal", tool, err)
	}
}

func TestUnpackLeavesOutsideLinksOut(t *testing.T) {
	t.Parallel()
	data := makeTar(t,
		entry{"keep/a", tar.TypeReg, 0o644, "a"},
		entry{"keep/out", tar.TypeSymlink, 0o777, "/usr/bin/python3"},
	)
	var outside []string
	got, _, err := unpack(t, data, archive.Options{
		Outside: func(name, target string) { outside = append(outside, name+" -> "+target) },
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{"keep": "drwxr-xr-x", "keep/a": "-rw-r--r-- a"}, got); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"keep/out -> /usr/bin/python3"}, outside); diff != "" {
		t.Errorf("links outside (-want +got):\n%s", diff)
	}
}

func TestUnpackXZTool(t *testing.T) {
	t.Parallel()
	tool := installed.Program(t, "xz")
	whole := compress(t, archive.XZ, makeTar(t, entry{"a", tar.TypeReg, 0o644, "through a pipe"}))
	got, _, err := unpack(t, whole, archive.Options{XZTool: tool})
	if err != nil || got["a"] != "-rw-r--r-- through a pipe" {
		t.Errorf("Unpack = %v, %v; want a", got, err)
	}
	if _, _, err := unpack(t, whole[:len(whole)-20], archive.Options{XZTool: tool}); err != nil &&
		!fault.Is(err, fault.Unverified) {
		t.Errorf("Unpack of a cut archive = %v; want an unverified error or none", err)
	}
	if _, _, err := unpack(t, whole[:len(whole)/2], archive.Options{XZTool: tool}); !fault.Is(err, fault.Unverified) {
		t.Errorf("Unpack of half an archive = %v; want an unverified error", err)
	}
}

func TestUnpackCancelled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("node is going away")
	cancel(why)
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if _, err := archive.Unpack(ctx, bytes.NewReader(makeTar(t, entry{"a", tar.TypeReg, 0o644, "x"})), root,
		archive.Options{}); !errors.Is(err, why) {
		t.Errorf("Unpack = %v; want the cause of the cancellation", err)
	}
}

// FuzzUnpack needs -fuzzminimizetime=1x. The goroutines of the zstd decoder change the coverage from run to run, and
// without the flag Go's fuzzing engine would minimise inputs for minutes.
func FuzzUnpack(f *testing.F) {
	plain := makeTar(f,
		entry{"d/", tar.TypeDir, 0o755, ""}, entry{"d/a", tar.TypeReg, 0o755, "a"},
		entry{"d/l", tar.TypeSymlink, 0o777, "../d/a"}, entry{"h", tar.TypeLink, 0o755, "d/a"},
	)
	for _, format := range []archive.Format{archive.Plain, archive.Gzip, archive.XZ, archive.Zstd} {
		f.Add(compress(f, format, plain))
	}
	f.Add(makeTar(f, entry{"a", tar.TypeSymlink, 0o777, ".."}, entry{"a/x", tar.TypeReg, 0o644, "x"}))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 64<<10 {
			t.Skip("input over 64 KiB")
		}
		dir := t.TempDir()
		inner := filepath.Join(dir, "tree")
		if err := os.Mkdir(inner, 0o755); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenRoot(inner)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		// Whether Unpack refuses the archive or not, it must write nothing outside the folder.
		_, _ = archive.Unpack(t.Context(), bytes.NewReader(data), root,
			archive.Options{Entries: 100, Bytes: 1 << 20, Outside: func(string, string) {}})
		if entries, rerr := os.ReadDir(dir); rerr != nil || len(entries) != 1 {
			t.Fatalf("Unpack left %v beside its folder, %v", entries, rerr)
		}
		// If the target of a link exists, it must be inside the folder.
		real, rerr := filepath.EvalSymlinks(inner)
		if rerr != nil {
			t.Fatal(rerr)
		}
		werr := filepath.WalkDir(inner, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.Type() != fs.ModeSymlink {
				return err
			}
			if to, err := filepath.EvalSymlinks(path); err == nil && to != real && !strings.HasPrefix(to, real+"/") {
				t.Fatalf("link %s leads to %s", path, to)
			}
			return nil
		})
		if werr != nil {
			t.Fatal(werr)
		}
	})
}
