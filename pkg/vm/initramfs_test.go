package vm

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/u-root/u-root/pkg/cpio"

	"github.com/prebake/prebake/pkg/fault"
)

// sampleConfig makes a boot folder of small files, and returns a config with this folder.
func sampleConfig(t *testing.T) Config {
	t.Helper()
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{
		"boot/vmlinuz": 0o644, "boot/emugpu.ko": 0o644, "boot/modules/order": 0o600,
		"boot/modules/virtio.ko": 0o644, "init": 0o755, "tree/lib64/lib.so.1": 0o755,
	} {
		p := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte("content of "+filepath.Base(name)), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("lib.so.1", filepath.Join(dir, "tree", "lib64", "lib.so")); err != nil {
		t.Fatal(err)
	}
	tree, err := Tree("/usr", filepath.Join(dir, "tree"))
	if err != nil {
		t.Fatal(err)
	}
	return Config{
		Boot: filepath.Join(dir, "boot"), Init: filepath.Join(dir, "init"), GPU: true, Network: true,
		Files: append(tree, File{Name: "/etc/empty", Data: []byte{}},
			File{Name: "/bin/tool", Data: []byte("#!"), Mode: 0o755}),
		Steps: []Step{{Argv: []string{"@cat", "/etc/empty"}}},
	}.WithDefaults()
}

// listing returns the entries of a cpio archive as text, one per line.
func listing(t *testing.T, archive []byte) string {
	t.Helper()
	var out strings.Builder
	r := cpio.Newc.Reader(bytes.NewReader(archive))
	err := cpio.ForEachRecord(r, func(rec cpio.Record) error {
		fmt.Fprintf(&out, "%06o %d %s", rec.Mode, rec.MTime+rec.UID+rec.GID, rec.Name)
		if rec.Mode&cpio.S_IFMT == cpio.S_IFLNK || strings.HasSuffix(rec.Name, ".json") {
			text, err := io.ReadAll(io.NewSectionReader(rec, 0, int64(rec.FileSize)))
			if err != nil {
				return err
			}
			fmt.Fprintf(&out, " = %s", text)
		}
		out.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

const wantListing = `040755 0 bin
100755 0 bin/tool
040755 0 dev
040755 0 etc
100644 0 etc/empty
100755 0 init
040755 0 prebake
100644 0 prebake/emugpu.ko
040755 0 prebake/modules
100644 0 prebake/modules/order
100644 0 prebake/modules/virtio.ko
100644 0 prebake/steps.json = {"gpu":true,"network":true,"steps":[{"name":"@cat /etc/empty","argv":["@cat","/etc/empty"]}]}
040755 0 proc
040755 0 root
040755 0 run
040755 0 sys
040755 0 tmp
040755 0 usr
040755 0 usr/lib64
120777 0 usr/lib64/lib.so = lib.so.1
100755 0 usr/lib64/lib.so.1
020600 0 dev/console
`

func TestInitramfs(t *testing.T) {
	t.Parallel()
	var first, second bytes.Buffer
	if err := writeInitramfs(&first, sampleConfig(t)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(wantListing, listing(t, first.Bytes())); diff != "" {
		t.Errorf("initramfs (-want +got):\n%s", diff)
	}
	if err := writeInitramfs(&second, sampleConfig(t)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("the same files in another folder gave another archive")
	}
}

func TestArrangeRefuses(t *testing.T) {
	t.Parallel()
	data := []byte("x")
	for _, row := range []struct {
		name  string
		files []File
		want  string
	}{
		{"relative", []File{{Name: "etc/x", Data: data}}, "clean absolute path"},
		{"up", []File{{Name: "/etc/../x", Data: data}}, "clean absolute path"},
		{"twice", []File{{Name: "/x", Data: data}, {Name: "/x", Data: data}}, "given twice"},
		{"below a file", []File{{Name: "/x", Data: data}, {Name: "/x/y", Data: data}}, "is not a folder"},
		{"below a link", []File{{Name: "/x", Link: "/y"}, {Name: "/x/y", Data: data}}, "is a link"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			_, err := arrangeFiles(row.files)
			if !fault.Is(err, fault.Usage) || !strings.Contains(err.Error(), row.want) {
				t.Errorf("arrange() = %v; want usage with %q", err, row.want)
			}
		})
	}
}

func TestStageInitramfsRefusesWhatDoesNotFit(t *testing.T) {
	t.Parallel()
	c := sampleConfig(t)
	c.MemoryMiB = 1
	c.Files = append(c.Files, File{Name: "/big", Data: make([]byte, 1<<20)})
	_, _, err := stageInitramfs(c)
	if !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
		t.Errorf("stageInitramfs() = %v; want usage with a hint", err)
	}
}

func TestTreeRefusesOddFiles(t *testing.T) {
	t.Parallel()
	if _, err := Tree("/x", filepath.Join(t.TempDir(), "missing")); err == nil {
		t.Error("Tree() of a missing folder = nil; want an error")
	}
	if _, err := Tree("/x", "/dev/null"); err == nil {
		t.Error("Tree() of a device = nil; want an error")
	}
}
