package mirror

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/program"
)

// aptGet is a script in place of the program apt-get. For `apt-get download`, it writes one file for each requested
// package. At the package "gone" it writes half a file, and ends with an error.
const aptGet = `#!/bin/sh
shift 2
for p in "$@"; do
  echo "$p" >> "$ASKED"
  [ "${p%%=*}" != gone ] || { echo half > "gone_1_amd64.deb"; echo "404 Not Found" >&2; exit 100; }
  echo deb > "${p%%=*}_${p#*=}_amd64.deb"
done
`

// TestDownloadGoesOn checks that an interrupted download keeps only complete packages, and that the next download
// fetches only what is missing.
func TestDownloadGoesOn(t *testing.T) {
	bin, dir := t.TempDir(), t.TempDir()
	asked := filepath.Join(t.TempDir(), "asked")
	if err := errors.Join(os.WriteFile(filepath.Join(bin, "apt-get"), []byte(aptGet), 0o755),
		os.Mkdir(filepath.Join(dir, "packages"), 0o755)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Setenv("ASKED", asked)
	a := &apt{dir: dir, progress: func(string) {}}
	var pkgs []pkg
	for _, name := range strings.Fields("a b c d e f g h gone i") {
		pkgs = append(pkgs, pkg{name, "1"})
	}
	err := a.download(t.Context(), pkgs)
	if !errors.Is(err, errDownload) || !fault.Is(err, fault.Transient) || !strings.Contains(err.Error(), "404") ||
		fault.Hint(err) == "" {
		t.Fatalf("download = %v (%v); want transient, with apt's words and a hint", err, fault.Of(err))
	}
	if _, ok := a.file(pkg{"gone", "1"}); ok {
		t.Error("an incomplete file got the name of a package")
	}
	if left, err := filepath.Glob(filepath.Join(dir, "download-*")); err != nil || len(left) > 0 {
		t.Errorf("download left %v, %v", left, err)
	}
	if err := os.Truncate(asked, 0); err != nil {
		t.Fatal(err)
	}
	pkgs[8].Name = "replaced"
	if err := a.download(t.Context(), pkgs); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(asked); err != nil || string(text) != "replaced=1\ni=1\n" {
		t.Errorf("the second download asked for %q, %v; want what was missing", text, err)
	}
}

// TestClangCachedNeedsNoCompiler checks that Make with ClangCached does not need the tools for compiling a kernel: it
// goes on to apt, which fails in this test. Without ClangCached, Make first returns an error that names the missing
// tools.
func TestClangCachedNeedsNoCompiler(t *testing.T) {
	bin := t.TempDir()
	for _, tool := range tools {
		program.Write(t, filepath.Join(bin, tool.name), []byte("#!/bin/sh\necho no archive is reachable >&2\nexit 100\n"))
	}
	t.Setenv("PATH", bin)
	for cached, want := range map[bool]string{true: "no archive is reachable", false: "flex, bison"} {
		c := Config{OnlyClang: true, ClangCached: cached, Out: t.TempDir(), Cache: t.TempDir()}
		if _, err := Make(t.Context(), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("a mirror with ClangCached %t: %v; want %q in it", cached, err, want)
		}
	}
}
