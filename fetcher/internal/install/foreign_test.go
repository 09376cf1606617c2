package install_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/target"
)

// TestForeignLibrariesStay checks lib64 when the first driver is installed. Files of other programs must stay visible,
// but files of another driver must not. Without the driver, lib64 must be as before.
func TestForeignLibrariesStay(t *testing.T) {
	t.Parallel()
	s := open(t)
	lib := filepath.Join(s.Dir(), "lib64")
	for name, text := range map[string]string{
		"libcuda.so.470.1": "old", "libnvidia-ml.so.470.1": "old", "libnvidia-ifr.so.470.1": "old", "libGL.so.1": "old",
		"libnccl.so.2.21": "nccl", "tuner.textproto": "nccl", "plugins/libnccl-net.so": "nccl",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(lib, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(lib, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("libnccl.so.2.21", filepath.Join(lib, "libnccl.so.2")); err != nil {
		t.Fatal(err)
	}
	list := func() (all []string) {
		t.Helper()
		err := fs.WalkDir(os.DirFS(lib), ".", func(name string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				all = append(all, name)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(all)
		return all
	}
	before := list()
	nothing, err := s.Pointers()
	if err != nil {
		t.Fatal(err)
	}
	l := install.Layer{Kind: bundle.LayerUserspace, Digest: digest("1")}
	err = s.AddLayer(l, func(dst *os.Root) error {
		if err := dst.Mkdir("lib64", 0o755); err != nil {
			return err
		}
		for _, name := range []string{"libcuda.so.535.1", "libnvidia-ml.so.535.1", "libGL.so.1"} {
			if err := dst.WriteFile("lib64/"+name, []byte("new"), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	set := install.Set{Digest: digest("1"), Driver: target.Driver{Version: "535.1", Flavour: target.Open},
		Layers: []install.Layer{l}}
	if err := s.AddSet(set, []byte("proof")); err != nil {
		t.Fatal(err)
	}
	if err := s.Switch(set.Digest); err != nil {
		t.Fatal(err)
	}
	want := []string{"libGL.so.1", "libcuda.so.535.1", "libnccl.so.2", "libnccl.so.2.21", "libnvidia-ml.so.535.1",
		"plugins/libnccl-net.so", "tuner.textproto"}
	if diff := cmp.Diff(want, list()); diff != "" {
		t.Errorf("lib64 with the driver (-want +got):\n%s", diff)
	}
	for name, want := range map[string]string{"libGL.so.1": "new", "libnccl.so.2": "nccl"} {
		if raw, err := os.ReadFile(filepath.Join(lib, name)); err != nil || string(raw) != want {
			t.Errorf("%s is %q, %v; want %q", name, raw, err, want)
		}
	}
	if err := s.Restore(nothing); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, list()); diff != "" {
		t.Errorf("lib64 without the driver (-want +got):\n%s", diff)
	}
}
