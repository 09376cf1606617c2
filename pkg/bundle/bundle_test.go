package bundle

import (
	"bytes"
	"context"
	"encoding/json"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

func sampleID() Identity {
	return Identity{
		Fingerprint: target.Fingerprint("sha256:" + strings.Repeat("0123456789abcdef", 4)),
		Arch:        target.AMD64,
		Release:     "6.1.0-47-cloud-amd64",
		Vermagic:    "6.1.0-47-cloud-amd64 SMP preempt mod_unload modversions ",
		Driver:      target.Driver{Version: "535.261.03", Flavour: target.Open},
	}
}

// tree writes files into a new folder, from a map of names to contents. If the content is "-> x", the file is a link to
// x. If the name ends in a slash, it is a folder. If the content begins with "#!", the file is executable.
func tree(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		full := filepath.Join(dir, name)
		var err error
		switch {
		case strings.HasSuffix(name, "/"):
			err = os.MkdirAll(full, 0o700)
		default:
			if err = os.MkdirAll(filepath.Dir(full), 0o700); err != nil {
				break
			}
			if link, ok := strings.CutPrefix(content, "-> "); ok {
				err = os.Symlink(link, full)
				break
			}
			mode := fs.FileMode(0o600)
			if strings.HasPrefix(content, "#!") {
				mode = 0o710
			}
			err = os.WriteFile(full, []byte(content), mode)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func pack(t testing.TB, kind LayerKind, files map[string]string) Layer {
	t.Helper()
	l, err := PackLayer(t.Context(), tree(t, files), kind, filepath.Join(t.TempDir(), "layer"))
	if err != nil {
		t.Fatalf("PackLayer(%s) = %v", kind, err)
	}
	return l
}

func sampleLayers(t testing.TB) []Layer {
	return []Layer{
		pack(t, LayerModules, map[string]string{"drivers/nvidia.ko": "\x7fELF", "drivers/nvidia-uvm.ko": "\x7fELF2"}),
		pack(t, LayerUserspace, map[string]string{
			"bin/nvidia-smi": "#!smi", "lib64/libcuda.so.1": "-> libcuda.so.535.261.03", "lib64/libcuda.so.535.261.03": "lib",
			"share/doc/" + strings.Repeat("long", 40) + "/LICENSE": "text", "lib64/libx.so": "-> ../lib64/libcuda.so.1",
			"vulkan/": "",
		}),
		pack(t, LayerFirmware, map[string]string{"firmware/nvidia/535.261.03/gsp_tu10x.bin": "gsp"}),
	}
}

// emptyRoot returns an empty folder to unpack into.
func emptyRoot(t testing.TB) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = root.Close() })
	return root
}

func unpackFile(t testing.TB, l Layer) (string, error) {
	t.Helper()
	f, err := os.Open(l.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	return dir, Unpack(t.Context(), f, l.Digest, l.DiffID, l.Size, root)
}

func list(t testing.TB, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		name, _ := filepath.Rel(dir, p)
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			link, err := os.Readlink(p)
			got[name] = "-> " + link
			return err
		case d.IsDir():
			got[name+"/"] = info.Mode().Perm().String()
		default:
			data, err := os.ReadFile(p)
			got[name] = info.Mode().Perm().String() + " " + string(data)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestPackUnpack(t *testing.T) {
	t.Parallel()
	long := "share/doc/" + strings.Repeat("long", 40)
	want := map[string]string{
		"bin/": "-rwxr-xr-x", "bin/nvidia-smi": "-rwxr-xr-x #!smi", "lib64/": "-rwxr-xr-x",
		"lib64/libcuda.so.1": "-> libcuda.so.535.261.03", "lib64/libcuda.so.535.261.03": "-rw-r--r-- lib",
		"lib64/libx.so": "-> ../lib64/libcuda.so.1", "share/": "-rwxr-xr-x", "share/doc/": "-rwxr-xr-x",
		long + "/": "-rwxr-xr-x", long + "/LICENSE": "-rw-r--r-- text", "vulkan/": "-rwxr-xr-x",
	}
	dir, err := unpackFile(t, sampleLayers(t)[1])
	if err != nil {
		t.Fatalf("Unpack = %v", err)
	}
	if diff := cmp.Diff(want, list(t, dir)); diff != "" {
		t.Errorf("Unpack(PackLayer(tree)) (-want +got):\n%s", diff)
	}
}

func TestUnpackAllLayersIntoOneFolder(t *testing.T) {
	t.Parallel()
	root := emptyRoot(t)
	for _, l := range sampleLayers(t) {
		data, err := os.ReadFile(l.Path)
		if err != nil {
			t.Fatal(err)
		}
		if err := Unpack(t.Context(), bytes.NewReader(data), l.Digest, l.DiffID, l.Size, root); err != nil {
			t.Errorf("Unpack(%s) = %v", l.Kind, err)
		}
		if err := Unpack(t.Context(), bytes.NewReader(data), l.Digest, l.DiffID, l.Size, root); err == nil {
			t.Errorf("Unpack(%s) a second time succeeded; want files that exist refused", l.Kind)
		}
	}
}

// TestPackIsDeterministic checks that a layer has the same bytes with another number of processors, and with other
// modes and times of the files. The test changes GOMAXPROCS, so it is not parallel.
func TestPackIsDeterministic(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	big := make([]byte, 12<<20)
	for i := 0; i+64 < len(big); i += 64 {
		for j := range 16 { // a quarter is random, so the data compresses partly
			big[i+j] = byte(rnd.Uint32())
		}
	}
	files := map[string]string{"drivers/nvidia.ko": string(big), "drivers/a.ko": "a", "drivers/B.ko": "b"}
	first, second := tree(t, files), tree(t, files)
	if err := os.Chmod(filepath.Join(second, "drivers/a.ko"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(filepath.Join(second, "drivers/B.ko"), time.Unix(1e9, 0), time.Unix(1e9, 0)); err != nil {
		t.Fatal(err)
	}
	before := runtime.GOMAXPROCS(1)
	defer runtime.GOMAXPROCS(before)
	one, err := PackLayer(t.Context(), first, LayerModules, filepath.Join(t.TempDir(), "x"))
	if err != nil {
		t.Fatal(err)
	}
	runtime.GOMAXPROCS(8)
	two, err := PackLayer(t.Context(), second, LayerModules, filepath.Join(t.TempDir(), "y"))
	if err != nil {
		t.Fatal(err)
	}
	one.Path, two.Path = "", ""
	if diff := cmp.Diff(one, two); diff != "" {
		t.Errorf("PackLayer differs with GOMAXPROCS 1 and 8, other modes and times (-1 +8):\n%s", diff)
	}
}

// TestPackKeepsItsBytes checks that each recipe gives the same digest as in the past. The tags of published artifacts
// point to these digests, so no other bytes could be published. To change the bytes, add a recipe and its digest below.
func TestPackKeepsItsBytes(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	words := []string{"nvidia", "module", "symbol", "kernel", "\x00\x00\x00\x00", "\x7fELF"}
	var text strings.Builder
	for text.Len() < 3<<20 {
		text.WriteString(words[random.IntN(len(words))])
		text.WriteByte(byte(random.UintN(256)))
	}
	src := tree(t, map[string]string{"drivers/nvidia.ko": text.String(), "drivers/nvidia-uvm.ko": text.String()[1<<20:]})
	const diffID = "sha256:aad0381547f6cb7ea43043b8c2a0a14d09b019013c034682489f7e23b8a96ce1"
	for recipe, digest := range map[string]string{
		"tar-zstd-1": "sha256:2bc114a93918b7497867a88ea9e0b0ba5276194c88404bb0c1af574a2601eb2f",
		"tar-zstd-2": "sha256:8cb09a4ecaf7332b3837a7411db270f30a75d5cba4af38522b3b109490722aa8",
	} {
		if !slices.Contains(PackRecipes(), recipe) {
			t.Errorf("PackRecipes = %v; want %s among them", PackRecipes(), recipe)
		}
		got, err := PackLayerAs(t.Context(), recipe, src, LayerModules, filepath.Join(t.TempDir(), "layer"))
		if err != nil || got.Digest != digest || got.DiffID != diffID {
			t.Errorf("PackLayerAs(%s) = digest %s, diff ID %s, %v; want %s, %s", recipe, got.Digest, got.DiffID, err, digest,
				diffID)
		}
	}
	newest, err := PackLayerAs(t.Context(), PackRecipes()[0], src, LayerModules, filepath.Join(t.TempDir(), "layer"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := PackLayer(t.Context(), src, LayerModules, filepath.Join(t.TempDir(), "layer"))
	if err != nil || got.Digest != newest.Digest {
		t.Errorf("PackLayer = digest %s, %v; want %s, as with %s", got.Digest, err, newest.Digest, PackRecipe)
	}
	if _, err := PackLayerAs(t.Context(), "tar-zstd-9", src, LayerModules,
		filepath.Join(t.TempDir(), "layer")); !fault.Is(err, fault.Unsupported) {
		t.Errorf("PackLayerAs(tar-zstd-9) = %v; want unsupported", err)
	}
}

func TestPackRefuses(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name  string
		kind  LayerKind
		files map[string]string
	}{
		{"absolute link", LayerUserspace, map[string]string{"lib64/a": "-> /etc/passwd"}},
		{"link that leads out", LayerUserspace, map[string]string{"lib64/a": "-> ../../x"}},
		{"link that climbs behind a name", LayerUserspace, map[string]string{"lib64/a": "-> b/../c"}},
		{"a module in user space", LayerUserspace, map[string]string{"drivers/nvidia.ko": "x"}},
		{"firmware in user space", LayerUserspace, map[string]string{"firmware/x": "x"}},
		{"a library among modules", LayerModules, map[string]string{"lib64/x.so": "x"}},
		{"a text among modules", LayerModules, map[string]string{"drivers/README": "x"}},
		{"a module in firmware", LayerFirmware, map[string]string{"drivers/nvidia.ko": "x"}},
		{"line break in a name", LayerUserspace, map[string]string{"bin/a\nb": "x"}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			dst := filepath.Join(t.TempDir(), "layer")
			if l, err := PackLayer(t.Context(), tree(t, row.files), row.kind, dst); err == nil {
				t.Errorf("PackLayer(%v) = %v; want an error", row.files, l)
			}
			if _, err := os.Stat(dst); err == nil {
				t.Error("PackLayer failed and left its file behind")
			}
		})
	}
}

func TestPackStopsWhenCancelled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := PackLayer(ctx, tree(t, map[string]string{"bin/a": "x"}), LayerUserspace, filepath.Join(t.TempDir(), "l"))
	if !fault.Is(err, fault.Cancelled) {
		t.Errorf("PackLayer(cancelled) = %v; want kind cancelled", err)
	}
}

func TestIdentityRoundTrip(t *testing.T) {
	t.Parallel()
	id := sampleID()
	got, err := parseIdentity(id.Annotations())
	if err != nil || got != id {
		t.Errorf("parseIdentity(Annotations) = %+v, %v; want %+v", got, err, id)
	}
	for key := range id.Annotations() {
		a := id.Annotations()
		delete(a, key)
		if _, err := parseIdentity(a); !fault.Is(err, fault.Unverified) {
			t.Errorf("parseIdentity without %s = %v; want kind unverified", key, err)
		}
		a[key] = "\n"
		if _, err := parseIdentity(a); !fault.Is(err, fault.Unverified) {
			t.Errorf("parseIdentity with a bad %s = %v; want kind unverified", key, err)
		}
	}
	if got, want := Tag(id), "535.261.03-open-0123456789abcdef"; got != want {
		t.Errorf("Tag = %q; want %q", got, want)
	}
	k := target.Kernel{BuildID: "17800.0.47", Board: "lakitu"}
	if got, want := KernelTag(k, id.Driver), "cos-17800.0.47-lakitu-535.261.03-open"; got != want {
		t.Errorf("KernelTag = %q; want %q", got, want)
	}
}

func sampleImage(t testing.TB) (v1.Image, []byte, []byte) {
	t.Helper()
	img, err := Image(sampleID(), sampleLayers(t))
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return img, manifest, config
}

func TestImage(t *testing.T) {
	t.Parallel()
	img, manifest, config := sampleImage(t)
	// The library's full check reads only gzip layers, so this test uses validate.Fast.
	if err := validate.Image(img, validate.Fast); err != nil {
		t.Errorf("validate.Image = %v", err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		rc, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		got, _, err := v1.SHA256(rc)
		want, werr := l.DiffID()
		if err != nil || werr != nil || got != want {
			t.Errorf("digest of the uncompressed layer = %v, %v; want its diff id %v, %v", got, err, want, werr)
		}
		if err := rc.Close(); err != nil {
			t.Error(err)
		}
	}
	got, err := ParseManifest(manifest, config)
	if err != nil {
		t.Fatalf("ParseManifest(Image) = %v", err)
	}
	if got.Identity != sampleID() {
		t.Errorf("identity = %+v; want %+v", got.Identity, sampleID())
	}
	for _, kind := range LayerKinds() {
		if l := got.Layer(kind); l.Kind != kind || l.Size == 0 || l.Digest == "" || l.DiffID == "" {
			t.Errorf("layer %s = %+v; want it whole", kind, l)
		}
	}
	again, _, _ := sampleImage(t)
	d1, err1 := img.Digest()
	d2, err2 := again.Digest()
	if err1 != nil || err2 != nil || d1 != d2 {
		t.Errorf("two images of equal trees: %v, %v (%v, %v); want one digest", d1, d2, err1, err2)
	}
	swapped := sampleLayers(t)
	swapped[0], swapped[1] = swapped[1], swapped[0]
	if _, err := Image(sampleID(), swapped); err == nil {
		t.Error("Image with layers in another order succeeded")
	}
	if _, err := Image(Identity{}, sampleLayers(t)); err == nil {
		t.Error("Image without an identity succeeded")
	}
}

func TestParseManifestRefuses(t *testing.T) {
	t.Parallel()
	_, manifest, config := sampleImage(t)
	edit := func(f func(m map[string]any)) []byte {
		var m map[string]any
		if err := json.Unmarshal(manifest, &m); err != nil {
			t.Fatal(err)
		}
		f(m)
		out, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	layer := func(m map[string]any, i int) map[string]any { return m["layers"].([]any)[i].(map[string]any) }
	rows := map[string][]byte{
		"empty":         nil,
		"null":          []byte("null"),
		"trailing data": append(bytes.Clone(manifest), '{', '}'),
		"too long":      append(bytes.Clone(manifest), bytes.Repeat([]byte(" "), MaxManifest)...),
		"unknown field": edit(func(m map[string]any) { m["extra"] = 1 }),
		"docker media type": edit(func(m map[string]any) {
			m["mediaType"] = "application/vnd.docker.distribution.manifest.v2+json"
		}),
		"subject":       edit(func(m map[string]any) { m["subject"] = m["config"] }),
		"artifact type": edit(func(m map[string]any) { m["artifactType"] = "x/y" }),
		"two layers":    edit(func(m map[string]any) { m["layers"] = m["layers"].([]any)[:2] }),
		"no layers":     edit(func(m map[string]any) { delete(m, "layers") }),
		"gzip layer": edit(func(m map[string]any) {
			layer(m,
				0)["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip"
		}),
		"layer kinds":      edit(func(m map[string]any) { layer(m, 0)["annotations"] = layer(m, 1)["annotations"] }),
		"layer from a URL": edit(func(m map[string]any) { layer(m, 0)["urls"] = []string{"https://example.com"} }),
		"negative size":    edit(func(m map[string]any) { layer(m, 0)["size"] = -1 }),
		"huge size":        edit(func(m map[string]any) { layer(m, 0)["size"] = int64(1) << 50 }),
		"sha512":           edit(func(m map[string]any) { layer(m, 0)["digest"] = "sha512:" + strings.Repeat("0", 128) }),
		"no digest":        edit(func(m map[string]any) { delete(layer(m, 0), "digest") }),
		"another config": edit(func(m map[string]any) {
			m["config"].(map[string]any)["digest"] = "sha256:" +
				strings.Repeat("0", 64)
		}),
		"no annotations":    edit(func(m map[string]any) { delete(m, "annotations") }),
		"another arch":      edit(func(m map[string]any) { m["annotations"].(map[string]any)[AnnotationArch] = "arm64" }),
		"an unknown format": edit(func(m map[string]any) { m["annotations"].(map[string]any)[AnnotationFormat] = "2" }),
		"an unknown flavour": edit(func(m map[string]any) {
			m["annotations"].(map[string]any)[AnnotationDriverFlavour] = "x"
		}),
	}
	for name, data := range rows {
		if c, err := ParseManifest(data, config); !fault.Is(err, fault.Unverified) {
			t.Errorf("%s: ParseManifest = %+v, %v; want kind unverified", name, c, err)
		}
	}
	if _, err := ParseManifest(manifest, append(bytes.Clone(config), ' ')); !fault.Is(err, fault.Unverified) {
		t.Errorf("ParseManifest with a changed config = %v; want kind unverified", err)
	}
}

func FuzzParseManifest(f *testing.F) {
	_, manifest, config := sampleImage(f)
	f.Add(manifest, config)
	f.Add([]byte(`{"schemaVersion":2,"layers":[{},{},{}]}`), []byte(`{}`))
	f.Add([]byte(`{"layers":null,"config":{"digest":""}}`), []byte(`null`))
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		c, err := ParseManifest(manifest, config)
		if err != nil {
			if !fault.Is(err, fault.Unverified) {
				t.Errorf("error %v has kind %v; want unverified", err, fault.Of(err))
			}
			return
		}
		again, err := parseIdentity(c.Identity.Annotations())
		if err != nil || again != c.Identity || len(c.Layers) != 3 {
			t.Errorf("identity %+v does not survive printing: %+v, %v", c.Identity, again, err)
		}
	})
}
