package cossrc_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/gcs"
)

// TestMirror reads every COS build of a mirror with real kernels. The mirror's URL is in PREBAKE_MIRROR.
func TestMirror(t *testing.T) {
	mirror := os.Getenv("PREBAKE_MIRROR")
	if mirror == "" {
		t.Skip("PREBAKE_MIRROR is not set: want the file:// URL of a folder with cos/ and drivers/, as `mirror` makes it")
	}
	dir := filepath.Join(strings.TrimPrefix(mirror, "file://"), "cos")
	builds, err := filepath.Glob(filepath.Join(dir, "*", "*", "kernel-headers.tgz"))
	if err != nil || len(builds) == 0 {
		t.Fatalf("no builds below %s: %v", dir, err)
	}
	bucket, cache := openEmpty(t, mirror+"/cos")

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
		t.Errorf("%d COS builds have %d fingerprints; want fewer, because one kernel was only compiled again",
			len(builds), len(byPrint))
	}
}

// TestEmulatorMirror checks that a COS build is the same, whether Fetch reads it from a folder or through Google's API.
// TestEmulatorLayouts has the other layouts, and plain HTTP.
func TestEmulatorMirror(t *testing.T) {
	mirror := os.Getenv("PREBAKE_MIRROR")
	if mirror == "" {
		t.Skip("PREBAKE_MIRROR is not set: want the file:// URL of a folder with cos/ and drivers/, as `mirror` makes it")
	}
	root := filepath.Join(strings.TrimPrefix(mirror, "file://"), "cos")
	builds, err := filepath.Glob(filepath.Join(root, "*", "lakitu", "kernel-headers.tgz"))
	if err != nil || len(builds) == 0 {
		t.Fatalf("no builds below %s: %v", root, err)
	}
	dir := filepath.Dir(builds[0])
	build := filepath.Base(filepath.Dir(dir))
	s := gcs.Start(t)
	s.Use(t)
	s.Bucket(t, "cos-tools")
	objects, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range objects {
		data, err := os.ReadFile(filepath.Join(dir, o.Name()))
		if err != nil {
			t.Fatal(err)
		}
		s.Put(t, "cos-tools", build+"/lakitu/"+o.Name(), data)
	}
	var want *cossrc.Inputs
	for _, url := range []string{mirror + "/cos", "gs://cos-tools"} {
		bucket, cache := openEmpty(t, url)
		in, err := cossrc.Fetch(t.Context(), bucket, cache, build, "lakitu", func(line string) { t.Log(line) })
		if err != nil {
			t.Fatalf("Fetch from %s: %v", url, err)
		}
		if want == nil {
			want = in
		}
		if in.Fingerprint != want.Fingerprint || in.Kernel != want.Kernel || len(in.Materials) != len(want.Materials) {
			t.Errorf("from %s: %+v; want %+v", url, in, want)
		}
		for i, m := range in.Materials {
			if m.Digest != want.Materials[i].Digest || !strings.HasPrefix(m.URI, url+"/"+build+"/") || m.Unverified {
				t.Errorf("material %+v; want %s, verified, from %s", m, want.Materials[i].Digest, url)
			}
		}
	}
}
