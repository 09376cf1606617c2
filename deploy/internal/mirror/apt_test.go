package mirror

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
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

// TestAnswers checks that apt answers a question again only after the index was fetched.
func TestAnswers(t *testing.T) {
	bin, dir, asked := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "asked")
	program.Write(t, filepath.Join(bin, "apt-get"), []byte("#!/bin/sh\nexit $BROKEN\n"))
	program.Write(t, filepath.Join(bin, "apt-cache"), []byte("#!/bin/sh\necho \"$@\" >>\"$ASKED\"\nwc -l <\"$ASKED\"\n"))
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Setenv("ASKED", asked)
	// names returns the number of questions that apt had answered when it gave this answer.
	names := func(refresh bool, broken, prefix string) string {
		t.Helper()
		t.Setenv("BROKEN", broken)
		a, err := openApt(t.Context(), dir, platforms[target.AMD64], false, refresh, func(string) {})
		if err != nil {
			t.Fatal(err)
		}
		got, err := a.packageNames(t.Context(), prefix)
		if err != nil || len(got) != 1 {
			t.Fatalf("packageNames = %v, %v", got, err)
		}
		return got[0]
	}
	got := []string{names(false, "0", "a"), names(false, "0", "a"), names(false, "0", "b"), names(false, "0", "a"),
		names(true, "0", "a"), names(false, "0", "a"), names(true, "100", "a"), names(false, "0", "a")}
	// A refused fetch may have changed a part of the index.
	want := []string{"1", "1", "2", "1", "3", "3", "4", "4"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("which call of apt gave each answer (-want +got):\n%s", diff)
	}
	// A mirror of an older version fetches the index, and knows of no answers.
	later := time.Now().Add(time.Minute)
	if err := os.Chtimes(filepath.Join(dir, "updated"), later, later); err != nil {
		t.Fatal(err)
	}
	if got := names(false, "0", "a"); got != "5" {
		t.Errorf("after a fetch without this function, answer %s is used; want a new one", got)
	}
}

// TestClangCachedNeedsNoCompiler checks that a machine without the tools for compiling a kernel gets as far as asking
// apt, if a kernel of an earlier run is wanted. Without ClangCached, the missing tools are named before anything else.
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
