package cossrc_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/target"
)

// TestMirror reads every build of a mirror made of real kernels.
func TestMirror(t *testing.T) {
	mirror := os.Getenv("PREBAKE_MIRROR")
	if mirror == "" {
		t.Skip("PREBAKE_MIRROR is not set: want the file:// URL of a folder with cos/ and drivers/, as `builder mirror` makes it")
	}
	dir := filepath.Join(strings.TrimPrefix(mirror, "file://"), "cos")
	builds, err := filepath.Glob(filepath.Join(dir, "*", "*", "kernel-headers.tgz"))
	if err != nil || len(builds) == 0 {
		t.Fatalf("no builds below %s: %v", dir, err)
	}
	bucket, err := cosbucket.Open(t.Context(), mirror+"/cos")
	if err != nil {
		t.Fatal(err)
	}
	defer bucket.Close()
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()

	byPrint := map[target.Fingerprint][]string{}
	for _, file := range builds {
		board := filepath.Base(filepath.Dir(file))
		build := filepath.Base(filepath.Dir(filepath.Dir(file)))
		in, err := cossrc.Fetch(t.Context(), bucket, cache, build, board, func(line string) { t.Log(line) })
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %s %q %s boot %t", in.Kernel, in.Kernel.Release, in.Kernel.Version, in.Fingerprint, in.Boot != "")
		for _, m := range in.Materials {
			if m.Unverified || m.Digest == "" {
				t.Errorf("%s: material %+v; want it verified", in.Kernel, m)
			}
		}
		cc := in.Env["CC"]
		if fi, err := os.Stat(filepath.Join(in.Toolchain, "bin", cc)); err != nil || fi.Mode()&0o111 == 0 {
			t.Errorf("%s: compiler %s is not in the toolchain: %v", in.Kernel, cc, err)
		}
		again, err := cossrc.Fetch(t.Context(), bucket, cache, build, board, func(line string) {
			if strings.Contains(line, "fetched") || strings.Contains(line, "unpacked") {
				t.Errorf("second run: %s", line)
			}
		})
		if err != nil || again.Fingerprint != in.Fingerprint || again.Headers != in.Headers {
			t.Errorf("second run: %v, %v", again, err)
		}
		parts := strings.Split(build, ".")
		byPrint[in.Fingerprint] = append(byPrint[in.Fingerprint], parts[2])
	}
	for fp, patches := range byPrint {
		for _, p := range patches {
			if p != patches[0] {
				t.Errorf("kernels %v share the fingerprint %s", patches, fp)
			}
		}
	}
	if len(byPrint) >= len(builds) {
		t.Errorf("%d builds have %d fingerprints; want the rebuilt kernel to share one", len(builds), len(byPrint))
	}
}
