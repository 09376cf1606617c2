package offline_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/prebake/prebake/builder/internal/offline"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// TestStockTools checks that skopeo and oras read a bundle, and that regctl reads the unpacked bundle. Each must copy
// the same bytes.
func TestStockTools(t *testing.T) {
	t.Parallel()
	for _, program := range []string{"skopeo", "oras", "regctl", "tar"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not on PATH: see deploy/tool.sh and deploy/setup.sh test", program)
		}
	}
	f := newFarm(t)
	img, err := random.Image(300, 2)
	if err != nil {
		t.Fatal(err)
	}
	img = mutate.ConfigMediaType(mutate.MediaType(img, types.OCIManifestSchema1), types.OCIConfigJSON)
	image := f.host + "/prebake/fetcher:v1"
	ref, err := name.ParseReference(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	program, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	snapshot := t.TempDir()
	if err := os.WriteFile(filepath.Join(snapshot, "root.json"), []byte("root"), 0o600); err != nil {
		t.Fatal(err)
	}
	file, _ := write(t, offline.Config{
		From: f.repo, Snapshot: snapshot,
		Images: []offline.Image{{Name: image, Ref: "v1", Repo: open(t, f.host+"/prebake/fetcher")}},
	})
	s := f.samples[0]
	tag := bundle.KernelTag(s.Kernel, s.Identity.Driver)
	dir := t.TempDir()
	must := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
		cmd.Dir = dir
		cmd.Env = []string{"HOME=" + dir, "XDG_RUNTIME_DIR=" + dir, "PATH=" + os.Getenv("PATH")}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
		}
		return strings.TrimSpace(string(out))
	}

	must("skopeo", "--insecure-policy", "copy", "oci-archive:"+file+":"+tag, "dir:skopeo")
	checkFolder(t, filepath.Join(dir, "skopeo"), s)
	must("skopeo", "--insecure-policy", "copy", "oci-archive:"+file+":"+image, "dir:program")
	if got := digest(t, filepath.Join(dir, "program", "manifest.json")); got != program.String() {
		t.Errorf("skopeo copied the program's image as %s; want %s", got, program)
	}

	if out := must("oras", "discover", "--oci-layout", "--format", "json", file+":"+tag); strings.Count(out,
		trust.ArtifactTypeBundle) < 2 {
		t.Errorf("oras discover = %s; want both statements", out)
	}
	must("oras", "cp", "--recursive", "--from-oci-layout", file+":"+tag, "--to-oci-layout", "oras:"+tag)
	checkLayout(t, "oci:"+filepath.Join(dir, "oras"), tag, f.key, s)
	must("oras", "pull", "--oci-layout", file+":"+offline.TagSnapshot, "-o", "snapshot")
	if got := string(read(t, filepath.Join(dir, "snapshot", "root.json"))); got != "root" {
		t.Errorf("oras pull wrote %q; want the snapshot's file", got)
	}

	must("regctl", "image", "copy", "--referrers", "ocidir://"+untar(t, file)+":"+tag, "ocidir://regctl:"+tag)
	checkLayout(t, "oci:"+filepath.Join(dir, "regctl"), tag, f.key, s)

	// This package must also read a tar that skopeo wrote.
	must("skopeo", "--insecure-policy", "copy", "oci:"+filepath.Join(dir, "oras")+":"+tag, "oci-archive:theirs.tar:"+tag)
	if d, err := open(t, "oci-archive:"+filepath.Join(dir, "theirs.tar")).Resolve(t.Context(), tag); err != nil ||
		d.Digest.String() != s.Digest {
		t.Errorf("Resolve in skopeo's tar = %v, %v; want %s", d.Digest, err, s.Digest)
	}
}

func digest(t *testing.T, file string) string {
	t.Helper()
	sum := sha256.Sum256(read(t, file))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// checkFolder compares the folder that skopeo wrote with the sample's manifest and layers.
func checkFolder(t *testing.T, dir string, s testkit.Sample) {
	t.Helper()
	if got := digest(t, filepath.Join(dir, "manifest.json")); got != s.Digest {
		t.Errorf("skopeo copied manifest %s; want %s", got, s.Digest)
	}
	for _, l := range s.Layers {
		if got, want := read(t, filepath.Join(dir, strings.TrimPrefix(l.Digest, "sha256:"))), read(t,
			l.Path); !bytes.Equal(got, want) {
			t.Errorf("skopeo copied %d bytes as layer %s; want %d, the same", len(got), l.Kind, len(want))
		}
	}
}

// checkLayout compares an OCI image layout with the sample, and verifies the statements in the layout.
func checkLayout(t *testing.T, ref, tag string, key *testkit.Key, s testkit.Sample) {
	t.Helper()
	repo := open(t, ref)
	if d, err := repo.Resolve(t.Context(), tag); err != nil || d.Digest.String() != s.Digest {
		t.Fatalf("Resolve(%s) in %s = %v, %v; want %s", tag, ref, d.Digest, err, s.Digest)
	}
	statements, err := repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := key.Verifier(t).Verify(statements, s.Expect()); err != nil {
		t.Errorf("Verify of what is in %s = %v; want nil", ref, err)
	}
	if _, err := offline.Show(t.Context(), repo); err != nil {
		t.Errorf("Show(%s) = %v; want every byte as its digest says", ref, err)
	}
}
