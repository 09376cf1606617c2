package offline_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/prebake/prebake/builder/internal/offline"
	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/symbols"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

var (
	older = target.Driver{Version: "535.261.03", Flavour: target.Open}
	newer = target.Driver{Version: "550.54.15", Flavour: target.Open}
)

func open(t *testing.T, ref string) *registry.Repository {
	t.Helper()
	r, err := registry.Open(ref, registry.Options{UserAgent: "prebake-test"})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// farm is a registry with the older driver for two kernels and the newer driver for one of them.
type farm struct {
	host    string
	repo    *registry.Repository
	key     *testkit.Key
	samples []testkit.Sample
}

func newFarm(t *testing.T) farm {
	t.Helper()
	f := farm{host: testkit.Registry(t, true), key: testkit.NewKey(t)}
	f.repo = open(t, f.host+"/prebake/driver")
	for _, cell := range []struct {
		kernel string
		driver target.Driver
	}{{"47", older}, {"50", older}, {"50", newer}} {
		s := testkit.NewSample(t, f.key, testkit.SampleKernel(cell.kernel), cell.driver, "")
		s.Publish(t, f.repo)
		f.samples = append(f.samples, s)
	}
	return f
}

// write packs a bundle and opens it.
func write(t *testing.T, c offline.Config) (file string, r *offline.Report) {
	t.Helper()
	c.Now = time.Now()
	var b bytes.Buffer
	r, err := offline.Write(t.Context(), &b, c)
	if err != nil {
		t.Fatal(err)
	}
	if r.Size != int64(b.Len()) {
		t.Errorf("Report.Size = %d; want %d", r.Size, b.Len())
	}
	file = filepath.Join(t.TempDir(), "bundle.tar")
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return file, r
}

func kernel(patch string) target.Kernel {
	k := testkit.SampleKernel(patch)
	return target.Kernel{BuildID: k.BuildID, Board: k.Board, Arch: k.Arch}
}

// TestBundleAndDelta checks that a bundle and its delta together contain everything that the registry has. The delta
// must contain only what the bundle lacks.
func TestBundleAndDelta(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	first := offline.Config{From: f.repo, Kernels: []target.Kernel{kernel("47")}, Verifier: f.key.Verifier(t)}
	base, whole := write(t, first)
	if again, r := write(t, first); r.Index != whole.Index || !bytes.Equal(read(t, again), read(t, base)) {
		t.Error("the same input made other bytes")
	}
	if len(whole.Artifacts) != 1 || whole.Artifacts[0].Digest != f.samples[0].Digest || whole.Artifacts[0].Attached != 2 ||
		whole.LeftOut != 0 || whole.Base != "" {
		t.Errorf("Write = %+v; want the first sample with two statements", whole)
	}

	delta, part := write(t, offline.Config{From: f.repo, Drivers: []string{older.Version},
		Since: open(t, "oci-archive:"+base)})
	if part.Base != whole.Index || part.LeftOut == 0 || len(part.Artifacts) != 2 || part.Size >= whole.Size+whole.Bytes {
		t.Errorf("Write of a delta = %+v; want two artifacts, without what %s has", part, whole.Index)
	}
	// The first bundle has the same driver version, and therefore the same layers of user space and firmware.
	for _, l := range f.samples[1].Layers[1:] {
		if bytes.Contains(read(t, delta), []byte("blobs/sha256/"+strings.TrimPrefix(l.Digest, "sha256:"))) {
			t.Errorf("the delta has the layer of %s; want it left out", l.Kind)
		}
	}
	second, _ := write(t, offline.Config{From: f.repo, Since: open(t, "oci-archive:"+base+"+"+delta)})
	chain := open(t, "oci-archive:"+base+"+"+delta+"+"+second)
	for _, s := range f.samples {
		if d, err := chain.Resolve(t.Context(), bundle.KernelTag(s.Kernel, s.Identity.Driver)); err != nil ||
			d.Digest.String() != s.Digest {
			t.Errorf("Resolve(tag of %s) = %v, %v; want %s", s.Kernel, d.Digest, err, s.Digest)
		}
		bundles, err := chain.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.key.Verifier(t).Verify(bundles, s.Expect()); err != nil {
			t.Errorf("Verify = %v; want nil", err)
		}
	}
	l, err := offline.Show(t.Context(), chain)
	if err != nil || len(l.Entries) != 3 || l.Attached != 6 {
		t.Errorf("Show = %+v, %v; want three drivers with six statements", l, err)
	}
	if _, err := offline.Show(t.Context(), open(t, "oci-archive:"+delta)); !fault.Is(err, fault.Usage) ||
		!strings.Contains(err.Error(), whole.Index) {
		t.Errorf("Show of a delta alone = %v; want kind usage, and the base named", err)
	}
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// TestBundleHoldsAll reads a bundle with another project's library. The library must find the snapshot, the keys, an
// image for two platforms, and an artifact with its statements. The bundle must not contain debug symbols.
func TestBundleHoldsAll(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	idx, err := random.Index(100, 1, 2)
	if err != nil {
		t.Fatal(err)
	}
	image := f.host + "/prebake/fetcher:v1"
	ref, err := name.ParseReference(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, idx, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	snapshot, keys := t.TempDir(), filepath.Join(t.TempDir(), "farm.pub")
	if err := os.MkdirAll(filepath.Join(snapshot, "targets"), 0o755); err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string]string{filepath.Join(snapshot, "root.json"): "root",
		filepath.Join(snapshot, "targets", "x.json"): "target", keys: string(f.key.PEM(t))} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d, err := f.repo.Resolve(t.Context(), f.samples[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.repo.Attach(t.Context(), d, symbols.ArtifactType, []byte("debug symbols"), nil); err != nil {
		t.Fatal(err)
	}
	file, r := write(t, offline.Config{
		From: f.repo, Kernels: []target.Kernel{kernel("47")}, Drivers: []string{older.Version},
		Flavours: []target.Flavour{target.Open},
		Keys:     []string{keys}, Snapshot: snapshot,
		Images: []offline.Image{{Name: image, Ref: "v1", Repo: open(t, f.host+"/prebake/fetcher")}},
	})
	if r.Keys != 1 || r.Snapshot != 2 || len(r.Images) != 1 || r.Artifacts[0].Attached != 2 {
		t.Errorf("Write = %+v; want a key, two files, an image and two statements", r)
	}
	if bytes.Contains(read(t, file), []byte("debug symbols")) {
		t.Error("the bundle has debug symbols")
	}
	repo := open(t, "oci-archive:"+file)
	dir := t.TempDir()
	for tag, kind := range map[string]string{offline.TagSnapshot: offline.TypeSnapshot,
		offline.TagKeys: offline.TypeKeys} {
		d, err := repo.Resolve(t.Context(), tag)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := registry.SaveFiles(t.Context(), repo, d.Digest.String(), kind, filepath.Join(dir, tag)); err != nil {
			t.Fatal(err)
		}
	}
	for file, want := range map[string]string{"snapshot/root.json": "root", "snapshot/targets/x.json": "target",
		"keys/keys.pem": string(f.key.PEM(t))} {
		if got := string(read(t, filepath.Join(dir, file))); got != want {
			t.Errorf("%s is %q; want %q", file, got, want)
		}
	}

	folder := untar(t, file)
	path, err := layout.FromPath(folder)
	if err != nil {
		t.Fatal(err)
	}
	index, err := path.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	bare, listed := 0, 0
	for _, d := range m.Manifests {
		switch name := d.Annotations["org.opencontainers.image.ref.name"]; {
		case name == "":
			bare++
		case name == strings.Replace(f.samples[0].Digest, ":", "-", 1):
			raw, err := path.Bytes(d.Digest)
			if err != nil {
				t.Fatal(err)
			}
			var list v1.IndexManifest
			if err := json.Unmarshal(raw, &list); err != nil {
				t.Fatal(err)
			}
			listed = len(list.Manifests)
		case name == image:
			got, err := index.ImageIndex(d.Digest)
			if err != nil {
				t.Fatal(err)
			}
			if m, err := got.IndexManifest(); err != nil || len(m.Manifests) != 2 {
				t.Errorf("the image has %v, %v; want two platforms", m, err)
			}
		}
	}
	if bare != 2 || listed != 2 {
		t.Errorf("%d statements are entries, and %d in the list; want 2 and 2", bare, listed)
	}
}

// TestWriteRefuses checks that Write returns an error with the reason if it cannot do what the Config asks for.
func TestWriteRefuses(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	link := t.TempDir()
	if err := os.Symlink("/etc/passwd", filepath.Join(link, "root.json")); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name string
		c    offline.Config
		kind fault.Kind
		says string
	}{
		{"a driver that one of two kernels lacks",
			offline.Config{Kernels: []target.Kernel{kernel("47"), kernel("50")}, Drivers: []string{newer.Version}},
			fault.NoArtifact, newer.Version + " on kernel " + kernel("47").String()},
		{"a kernel that nobody built for", offline.Config{Kernels: []target.Kernel{kernel("99")}}, fault.NoArtifact,
			kernel("99").String()},
		{"a version that nobody built", offline.Config{Drivers: []string{"470.1.1"}}, fault.NoArtifact, "470.1.1"},
		{"a flavour that nobody built", offline.Config{Flavours: []target.Flavour{target.Proprietary}}, fault.NoArtifact,
			"this selection"},
		{"another signer", offline.Config{Verifier: testkit.NewKey(t).Verifier(t)}, fault.Unverified, "verify artifact"},
		{"an empty snapshot", offline.Config{Snapshot: t.TempDir()}, fault.Usage, "empty"},
		{"a snapshot with a link", offline.Config{Snapshot: link}, fault.Usage, "is not a regular file"},
		{"a registry as the earlier one", offline.Config{Since: f.repo}, fault.Usage, "is not a bundle"},
		{"an image that is not there", offline.Config{Images: []offline.Image{{Name: "x", Ref: "v9", Repo: f.repo}}},
			fault.NoArtifact, "v9"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			row.c.From, row.c.Now = f.repo, time.Now()
			var b bytes.Buffer
			if r, err := offline.Write(t.Context(), &b, row.c); !fault.Is(err, row.kind) ||
				!strings.Contains(err.Error(), row.says) {
				t.Errorf("Write = %+v, %v; want kind %s and %q", r, err, row.kind, row.says)
			}
		})
	}
}

// TestWriteBesideJunk attaches invalid statements to an artifact, as anybody with the right to push can. The bundle
// must contain the artifact nevertheless.
func TestWriteBesideJunk(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	repo := open(t, testkit.Registry(t, true)+"/prebake/driver")
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), older, "")
	if _, _, err := publish.Publish(t.Context(), repo, publish.Artifact{Image: s.Image, Identity: s.Identity,
		Kernel: s.Kernel, Bundles: s.Bundles, Verifier: key.Verifier(t)}); err != nil {
		t.Fatal(err)
	}
	testkit.AttachJunk(t, repo, s.Digest, trust.PredicateProvenance)
	if _, r := write(t, offline.Config{From: repo, Verifier: key.Verifier(t)}); len(r.Artifacts) != 1 {
		t.Errorf("Write packed %d artifacts; want one", len(r.Artifacts))
	}
}

// TestWriteComparesBytes checks that Write returns an error if a blob's bytes do not have the blob's digest.
func TestWriteComparesBytes(t *testing.T) {
	t.Parallel()
	dir, key := t.TempDir(), testkit.NewKey(t)
	repo := open(t, "oci:"+dir)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), older, "")
	s.Publish(t, repo)
	blob := filepath.Join(dir, "blobs/sha256", strings.TrimPrefix(s.Layers[0].Digest, "sha256:"))
	raw := read(t, blob)
	raw[len(raw)/2] ^= 1
	if err := os.WriteFile(blob, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := offline.Write(t.Context(), &b, offline.Config{From: repo}); !fault.Is(err, fault.Unverified) ||
		!strings.Contains(err.Error(), s.Layers[0].Digest) {
		t.Errorf("Write of a damaged blob = %v; want kind unverified, and the blob named", err)
	}
}

// TestDeltaUnpackedOverBase unpacks a bundle, and then its delta into the same folder. The folder must be the complete
// later layout.
func TestDeltaUnpackedOverBase(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	base, _ := write(t, offline.Config{From: f.repo, Kernels: []target.Kernel{kernel("47")}})
	delta, r := write(t, offline.Config{From: f.repo, Since: open(t, "oci-archive:"+base)})
	l, err := offline.Show(t.Context(), open(t, "oci:"+untar(t, base, delta)))
	if err != nil || l.Index != r.Index || len(l.Entries) != 3 {
		t.Errorf("Show of both in a folder = %+v, %v; want three drivers, index %s", l, err, r.Index)
	}
	if diff := cmp.Diff(r.Blobs+r.LeftOut, l.Blobs); diff != "" {
		t.Errorf("blobs of the later layout (-packed or left out, +shown):\n%s", diff)
	}
}
