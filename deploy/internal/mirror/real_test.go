package mirror

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestReal makes two mirrors from the same Debian packages, each with two kernels, and compares every file. Then it
// compiles with the toolchain archive in a sandbox that hides the machine's own compiler.
//
// It takes a minute, so it runs only if PREBAKE_MIRROR_CACHE is set to the cache folder of an earlier `mirror`.
func TestReal(t *testing.T) {
	cache := os.Getenv("PREBAKE_MIRROR_CACHE")
	if cache == "" {
		t.Skip("PREBAKE_MIRROR_CACHE is not set to the folder with Debian packages that `mirror --cache` filled")
	}
	packages, err := filepath.Glob(filepath.Join(cache, "debian/packages/*.deb"))
	if err != nil || len(packages) == 0 {
		t.Fatalf("no packages under %s: %v", cache, err)
	}
	var sums [2]map[string]string
	var out string
	for i := range sums {
		out = filepath.Join(t.TempDir(), strings.Repeat("deeper/", i), "mirror")
		own := t.TempDir()
		linkPackages(t, filepath.Join(cache, "debian"), filepath.Join(own, "debian"))
		// The preset of xz differs from the one of the command `mirror`, because -0 takes much less processor time.
		c := Config{Out: out, Cache: own, OnlyKernels: true, Kernels: 2, Progress: func(line string) { t.Log(line) },
			xzPreset: "-0"}
		if _, err := Make(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		sums[i] = digests(t, out)
	}
	if diff := cmp.Diff(sums[0], sums[1]); diff != "" {
		t.Errorf("two mirrors of the same packages differ (-first +second)\n%s", diff)
	}
	archives, err := filepath.Glob(filepath.Join(out, "cos/*/lakitu/toolchain.tar.xz"))
	if err != nil || len(archives) == 0 {
		t.Fatalf("no toolchain in the mirror: %v", err)
	}
	compileHidden(t, archives[0])
}

// linkPackages makes apt's folder own with the packages and the package index of another cache. Nothing that apt does
// in own changes the other cache.
func linkPackages(t *testing.T, other, own string) {
	t.Helper()
	for _, pattern := range []string{"packages/*.deb", "lists/*_*"} {
		files, err := filepath.Glob(filepath.Join(other, pattern))
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(own, filepath.Dir(pattern))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if err := os.Symlink(file, filepath.Join(dir, filepath.Base(file))); err != nil {
				t.Fatal(err)
			}
		}
	}
	// The index is as old as in the other cache. It is fetched again if that cache has another Debian release's index.
	for _, name := range []string{"prebake.sources", "updated"} {
		file := filepath.Join(other, name)
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(own, name)
		if err := errors.Join(os.WriteFile(to, text, 0o644), os.Chtimes(to, time.Time{}, info.ModTime())); err != nil {
			t.Fatal(err)
		}
	}
}

func digests(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(filepath.Join(dir, name))
		sum := sha256.Sum256(data)
		all[name] = hex.EncodeToString(sum[:])
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// compileHidden checks that the compiler, the assembler, the linker and their libraries except libc come from the
// archive. In the sandbox, the archive is at another path, because it must work in any folder.
func compileHidden(t *testing.T, archive string) {
	t.Helper()
	dir := t.TempDir()
	if _, err := output(exec.CommandContext(t.Context(), "tar", "-xJf", archive, "-C", dir)); err != nil {
		t.Fatal(err)
	}
	const script = `set -e
cd /tmp
echo 'int twice(int x) { return 2 * x; }' > t.c
gcc=x86_64-cros-linux-gnu-gcc
for p in cc1 as ld; do readlink -f $($gcc -print-prog-name=$p); done
$gcc -O2 -c t.c -o t.o
x86_64-cros-linux-gnu-ld -r -o u.o t.o
x86_64-cros-linux-gnu-nm u.o | grep -q ' T twice'
ldd $($gcc -print-prog-name=cc1) $($gcc -print-prog-name=ld) | awk '$2 == "=>" { print $3 }' | while read -r l; do readlink -f "$l"; done | sort -u`
	out, err := output(exec.CommandContext(t.Context(), "bwrap", "--unshare-all", "--clearenv", "--setenv", "PATH",
		"/elsewhere/toolchain/bin:/usr/bin",
		"--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64",
		"/lib64",
		"--tmpfs", "/usr/lib/gcc", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--ro-bind", dir,
		"/elsewhere/toolchain", "bash", "-c", script))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range strings.Fields(string(out)) {
		if base := filepath.Base(file); !strings.HasPrefix(file, "/elsewhere/toolchain/") && base != "libc.so.6" &&
			base != "libm.so.6" {
			t.Errorf("the toolchain uses %s of the machine", file)
		}
	}
}
