package inspect

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/target"
)

// TestPrintable checks that the text of a bucket cannot control the terminal of the person who reads it.
func TestPrintable(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"CONFIG_A=\"é x\"\tb\nc": "CONFIG_A=\"é x\"\tb\nc", "\x1b[2Jgone\a\r": "\uFFFD[2Jgone\uFFFD\uFFFD",
		"a\u202eb\xff": "a\uFFFDb\uFFFD",
	} {
		if got := printable(text); got != want {
			t.Errorf("printable(%q) = %q; want %q", text, got, want)
		}
	}
	if got := printable(string(make([]byte, 1<<20))); len([]rune(got)) > maxText+4 {
		t.Errorf("a text of 1 MiB is cut to %d runes; want about %d", len([]rune(got)), maxText)
	}
}

// TestProgressIsPrintable examines a COS build whose archives have links with control characters in name and target.
// The lines of progress about these links must have none.
func TestProgressIsPrintable(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var tree strings.Builder
	zw := gzip.NewWriter(&tree)
	tw := tar.NewWriter(zw)
	if err := errors.Join(tw.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "usr/\x1b[2J",
		Linkname: "../../../\x1b]0;title\a"}), tw.Close(), zw.Close()); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"toolchain_env": "CC=x86_64-cros-linux-gnu-gcc\n",
		"kernel-headers.tgz": tree.String(), "toolchain.tar.xz": tree.String()} {
		name = filepath.Join(dir, "cos/17800.0.1/lakitu", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	kernel, err := target.ParseKernel("17800.0.1", "lakitu")
	if err != nil {
		t.Fatal(err)
	}
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	bucket, err := cosbucket.Open(t.Context(), "file://"+dir+"/cos")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	Build(t.Context(), bucket, cache, kernel, Config{DriverMirror: "file://" + dir,
		Progress: func(line string) { lines = append(lines, line) }})
	if err := errors.Join(bucket.Close(), cache.Close()); err != nil {
		t.Error(err)
	}
	all := strings.Join(lines, "\n")
	if !strings.Contains(all, "left out the link usr/\uFFFD[2J") || printable(all) != all {
		t.Errorf("progress = %q; want the link, without control characters", all)
	}
}
