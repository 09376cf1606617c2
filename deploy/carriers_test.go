package deploy_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/distribution"
	"github.com/prebake/prebake/pkg/trust"
)

// TestCarriers checks that containerd handles an artifact as any other image: it pulls the artifact from the server and
// through a mirror, and mounts it as an image volume. The artifact's registry, farm.example, does not exist; hosts.toml
// names another host for it.
func TestCarriers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("containerd runs as root only; run the test as root")
	}
	r := startServer(t)
	c := newClient(t, r)
	repo, err := registry.Open(r.Host+"/prebake/driver", registry.Options{Plain: true, Password: secret})
	if err != nil {
		t.Fatal(err)
	}
	s := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"),
		target.Driver{Version: "535.261.03", Flavour: target.Open}, "")
	s.Publish(t, repo)
	want := tree(t, unpackArtifact(t, repo, s))
	passing := distribution.StartMirror(t, r.URL)
	for name, mirror := range map[string]string{"the server": r.Host, "a pull-through mirror": passing} {
		t.Run(name, func(t *testing.T) {
			c := c
			c.t = t
			socket := startContainerd(c)
			ctr := func(args ...string) []string { return append([]string{"--address", socket, "images"}, args...) }
			hosts := hostsDir(t, "farm.example", mirror)
			ref := "farm.example/prebake/driver@" + s.Digest
			c.must("ctr", ctr("pull", "--hosts-dir", hosts, "--snapshotter", "native", ref)...)
			at := t.TempDir()
			c.must("ctr", ctr("mount", "--snapshotter", "native", ref, at)...)
			defer c.must("ctr", ctr("unmount", at)...)
			if diff := cmp.Diff(want, tree(t, at)); diff != "" {
				t.Errorf("what containerd mounts (-artifact +mounted):\n%s", diff)
			}
		})
	}
	// The mirror passes on manifests and layers, but no attestations. A node therefore accepts nothing from the mirror
	// alone (docs/how-to/carriers.md).
	through, err := registry.Open(passing+"/prebake/driver", registry.Options{Plain: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := through.Manifest(t.Context(), s.Digest); err != nil {
		t.Errorf("Manifest through the mirror = %v; want nil", err)
	}
	if got, err := through.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle); err != nil || len(got) != 0 {
		t.Errorf("Attached through the mirror = %d, %v; want none: if it now has some, change docs/how-to/carriers.md",
			len(got), err)
	}
}

// hostsDir returns a folder with a hosts.toml that makes containerd pull a registry's images from a mirror. The format
// is in containerd's docs/hosts.md.
func hostsDir(t *testing.T, registry, mirror string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, registry), 0o755); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("server = \"https://%s\"\n\n[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n",
		registry, mirror)
	if err := os.WriteFile(filepath.Join(dir, registry, "hosts.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// unpackArtifact returns a folder with the artifact's files, as a node installs them.
func unpackArtifact(t *testing.T, repo *registry.Repository, s testkit.Sample) string {
	t.Helper()
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for _, l := range s.Layers {
		rc, err := repo.Blob(t.Context(), l.Digest, l.Size)
		if err != nil {
			t.Fatal(err)
		}
		if err := bundle.Unpack(t.Context(), rc, l.Digest, l.DiffID, l.Size, root); err != nil {
			t.Fatal(err)
		}
		if err := rc.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// tree maps each file of a folder to its mode and its content or target.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		what := ""
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			what, err = os.Readlink(path)
		case d.Type().IsRegular():
			var raw []byte
			raw, err = os.ReadFile(path)
			what = string(raw)
		}
		all[name] = info.Mode().String() + " " + what
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
