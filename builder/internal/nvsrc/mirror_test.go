package nvsrc_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// TestMirror reads every driver of the mirror that PREBAKE_MIRROR names. A mirror has real releases of NVIDIA.
func TestMirror(t *testing.T) {
	mirror := os.Getenv("PREBAKE_MIRROR")
	if mirror == "" {
		t.Skip("PREBAKE_MIRROR is not set: want the file:// URL of a folder with cos/ and drivers/, as `mirror` makes it")
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimPrefix(mirror, "file://"), "drivers",
		"NVIDIA-Linux-x86_64-*.run"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no runfiles in %s/drivers: %v", mirror, err)
	}
	bucket, cache := openEmpty(t, mirror+"/drivers")
	for _, file := range files {
		version := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(file), "NVIDIA-Linux-x86_64-"), ".run")
		r, err := nvsrc.Fetch(t.Context(), bucket, cache, version, target.AMD64, func(line string) { t.Log(line) })
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %v, source %s", version, r.Flavours, r.SourceDigest)
		if r.Manifest == nil {
			t.Errorf("%s: no manifest", version)
		}
		dst := t.TempDir()
		if err := r.StageUserspace(dst); err != nil {
			t.Fatal(err)
		}
		if err := r.StageFirmware(dst); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{
			"lib64/libcuda.so", "lib64/libcuda.so.1", "lib64/libcuda.so." + version, "lib64/libnvidia-ml.so.1",
			"lib64/libnvidia-ptxjitcompiler.so.1",
			"bin/nvidia-smi", "bin/nvidia-modprobe", "firmware/nvidia/" + version + "/gsp_tu10x.bin",
		} {
			if fi, err := os.Stat(filepath.Join(dst, name)); err != nil || fi.Size() == 0 {
				t.Errorf("%s: %v", name, err)
			}
		}
		// Some releases have no manifest. Then file names and SONAMEs alone must give the same user space.
		r.Manifest = nil
		plain := t.TempDir()
		if err := r.StageUserspace(plain); err != nil {
			t.Fatal(err)
		}
		with, without := digest(t, filepath.Join(dst, "lib64")), digest(t, filepath.Join(plain, "lib64"))
		if with != without {
			t.Errorf("%s: libraries differ without the manifest:\n%v\n%v", version, names(t, filepath.Join(dst, "lib64")),
				names(t, filepath.Join(plain, "lib64")))
		}
		t.Logf("%s: lib64 %v, bin %v", version, names(t, filepath.Join(dst, "lib64")), names(t, filepath.Join(dst, "bin")))
	}
	_, err = nvsrc.Fetch(t.Context(), bucket, cache, "535.1.1", target.AMD64, nil)
	if !fault.Is(err, fault.InputMissing) || !strings.Contains(fault.Hint(err), "535.") {
		t.Errorf("unknown version: %v, hint %q; want the versions that there are", err, fault.Hint(err))
	}
}

func digest(t *testing.T, dir string) string {
	t.Helper()
	sum, err := cas.DigestTree(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := make([]string, len(entries))
	for i, e := range entries {
		all[i] = e.Name()
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			all[i] += " -> " + to
		}
	}
	return all
}
