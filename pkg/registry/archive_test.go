package registry_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// entry is one entry of a tar.
type entry struct {
	tar.Header
	body string
}

func file(name, body string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(body))}, body}
}

// pack writes a tar with the given entries and returns its path.
func pack(t testing.TB, entries ...entry) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "layout.tar")
	if err := os.WriteFile(path, packed(t, entries...), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func packed(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// folderEntries returns the files of a folder as entries of a tar. Their names are those that tar -C FOLDER . gives.
func folderEntries(t testing.TB, dir string) (all []entry) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			all = append(all, entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: "./" + rel + "/", Mode: 0o755}})
			return nil
		}
		raw, err := os.ReadFile(path)
		all = append(all, file("./"+rel, string(raw)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// publishSample publishes a signed sample in a new layout, and returns the layout's folder.
func publishSample(t testing.TB) (dir string, s testkit.Sample, key *testkit.Key) {
	t.Helper()
	key = testkit.NewKey(t)
	s = testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	dir = t.TempDir()
	s.Publish(t, open(t, "oci:"+dir))
	return dir, s, key
}

// TestLayoutRepairsLayers checks that publishing again replaces damaged layers, whether or not their size has changed.
func TestLayoutRepairsLayers(t *testing.T) {
	t.Parallel()
	dir, s, _ := publishSample(t)
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	layers := 0
	for _, name := range blobs {
		raw, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if raw[0] == '{' { // a layer is no JSON
			continue
		}
		if raw[0] ^= 1; layers%2 == 1 {
			raw = raw[1:]
		}
		layers++
		if err := os.WriteFile(name, raw, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if layers < 2 {
		t.Fatalf("%d layers; want one to change and one to cut", layers)
	}
	s.Publish(t, open(t, "oci:"+dir))
	for _, name := range blobs {
		raw, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if got, _, err := v1.SHA256(bytes.NewReader(raw)); err != nil || got.Hex != filepath.Base(name) {
			t.Errorf("blob %s after publishing again: digest %s, %v", filepath.Base(name), got.Hex, err)
		}
	}
	checkContent(t, open(t, "oci:"+dir), s)
}

func TestArchive(t *testing.T) {
	t.Parallel()
	dir, s, _ := publishSample(t)
	repo := open(t, "oci-archive:"+pack(t, folderEntries(t, dir)...))
	checkContent(t, repo, s)
	if d, err := repo.Resolve(t.Context(), bundle.KernelTag(s.Kernel, driver)); err != nil ||
		d.Digest.String() != s.Digest {
		t.Errorf("Resolve(kernel's tag) = %v, %v; want %s", d.Digest, err, s.Digest)
	}
	if got, err := repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle); err != nil ||
		len(got) != len(s.Bundles) {
		t.Errorf("Attached = %d bundles, %v; want %d", len(got), err, len(s.Bundles))
	}
	if _, err := repo.Resolve(t.Context(), "v2"); !fault.Is(err, fault.NoArtifact) {
		t.Errorf("Resolve of what is not there = %v; want kind no-artifact", err)
	}
	// An attachment must be found even if only the index lists it, or only the list under a tag.
	for name, keep := range map[string]func(d v1.Descriptor) bool{
		"entries alone": func(d v1.Descriptor) bool {
			return !strings.HasPrefix(d.Annotations[registry.AnnotationRefName], "sha256-")
		},
		"the list alone": func(d v1.Descriptor) bool { return d.Annotations[registry.AnnotationRefName] != "" },
	} {
		some := folderEntries(t, dir)
		for i := range some {
			if !strings.HasSuffix(some[i].Name, "index.json") {
				continue
			}
			var idx v1.IndexManifest
			if err := json.Unmarshal([]byte(some[i].body), &idx); err != nil {
				t.Fatal(err)
			}
			had := len(idx.Manifests)
			if idx.Manifests = slices.DeleteFunc(idx.Manifests,
				func(d v1.Descriptor) bool { return !keep(d) }); len(idx.Manifests) == had {
				t.Fatalf("%s: nothing was taken out of %d entries", name, had)
			}
			raw, err := json.Marshal(idx)
			if err != nil {
				t.Fatal(err)
			}
			some[i] = file("index.json", string(raw))
		}
		got, err := open(t, "oci-archive:"+pack(t, some...)).Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle)
		if err != nil || len(got) != len(s.Bundles) {
			t.Errorf("%s: Attached = %d bundles, %v; want %d", name, len(got), err, len(s.Bundles))
		}
	}
	d, err := repo.Resolve(t.Context(), s.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Push(t.Context(), s.Image); !fault.Is(err, fault.Usage) {
		t.Errorf("Push to a tar = %v; want kind usage", err)
	}
	if err := repo.Tag(t.Context(), d, "new"); !fault.Is(err, fault.Usage) {
		t.Errorf("Tag in a tar = %v; want kind usage", err)
	}
	if err := repo.CheckPush(t.Context()); !fault.Is(err, fault.Usage) {
		t.Errorf("CheckPush of a tar = %v; want kind usage", err)
	}
}

// split makes a complete bundle and a delta from a layout. inDelta selects the blobs of the delta.
func split(t *testing.T, dir string, inDelta func(name string) bool) (base, delta string, baseIndex string) {
	t.Helper()
	var first, second []entry
	for _, e := range folderEntries(t, dir) {
		switch {
		case inDelta(e.Name):
			second = append(second, e)
		case strings.HasSuffix(e.Name, "index.json"):
			first = append(first, e)
			baseIndex = digestOf([]byte(e.body))
			var idx v1.IndexManifest
			if err := json.Unmarshal([]byte(e.body), &idx); err != nil {
				t.Fatal(err)
			}
			idx.Annotations = map[string]string{registry.AnnotationBase: baseIndex}
			raw, err := json.Marshal(idx)
			if err != nil {
				t.Fatal(err)
			}
			second = append(second, file("index.json", string(raw)))
		case strings.HasSuffix(e.Name, "oci-layout"):
			first, second = append(first, e), append(second, e)
		default:
			first = append(first, e)
		}
	}
	return pack(t, first...), pack(t, second...), baseIndex
}

func digestOf(raw []byte) string {
	sum := sha256.Sum256(raw)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func TestArchiveDelta(t *testing.T) {
	t.Parallel()
	dir, s, _ := publishSample(t)
	modules := s.Layers[0]
	base, delta, index := split(t, dir, func(name string) bool {
		return strings.HasSuffix(name, strings.TrimPrefix(modules.Digest, "sha256:"))
	})
	checkContent(t, open(t, "oci-archive:"+base+"+"+delta), s)

	unpacked := t.TempDir()
	if err := os.CopyFS(unpacked, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	checkContent(t, open(t, "oci-archive:"+unpacked+"+"+delta), s) // the base is an unpacked folder

	alone := open(t, "oci-archive:"+delta)
	_, err := alone.Manifest(t.Context(), s.Digest)
	if !fault.Is(err, fault.Usage) || !strings.Contains(err.Error(), index) ||
		!strings.Contains(fault.Hint(err), "oci-archive:EARLIER.tar+"+delta) {
		t.Errorf("Manifest of a delta alone = %v (%s); want kind usage, and the base %s named", err, fault.Hint(err), index)
	}
	if _, err := alone.Referrers(t.Context(), s.Digest, ""); !fault.Is(err, fault.Usage) {
		t.Errorf("Referrers of a delta alone = %v; want kind usage, and not an empty list", err)
	}
	otherDir, _, _ := publishSample(t)
	other := pack(t, folderEntries(t, otherDir)...)
	for ref, names := range map[string]string{
		other + "+" + delta:              index, // the delta of another base
		base + "+" + other:               "is a complete bundle",
		base + "+" + delta + "+" + delta: "is a delta of",
	} {
		if _, err := open(t, "oci-archive:"+ref).Resolve(t.Context(), s.Digest); !fault.Is(err, fault.Usage) ||
			!strings.Contains(err.Error(), names) {
			t.Errorf("Resolve in %s = %v; want kind usage and %q", ref, err, names)
		}
	}
}

// TestHostileArchives reads tars that are damaged, or that attack the reader.
func TestHostileArchives(t *testing.T) {
	t.Parallel()
	dir, s, _ := publishSample(t)
	good := folderEntries(t, dir)
	with := func(more ...entry) []entry { return append(slices.Clone(good), more...) }
	link := func(kind byte, name, to string) entry {
		return entry{Header: tar.Header{Typeflag: kind, Name: name, Linkname: to, Mode: 0o777}}
	}
	blob := "blobs/sha256/" + strings.Repeat("a", 64)
	changed := func(change func(e *entry)) []entry {
		all := slices.Clone(good)
		for i := range all {
			change(&all[i])
		}
		return all
	}
	without := func(suffix string) []entry {
		return slices.DeleteFunc(slices.Clone(good), func(e entry) bool { return strings.HasSuffix(e.Name, suffix) })
	}
	manifest := strings.TrimPrefix(s.Digest, "sha256:")
	for name, entries := range map[string][]entry{
		"path that leads out": with(file("../etc/passwd", "x")),
		"path with .. within": with(file("blobs/../../x", "x")),
		"absolute path":       with(file("/etc/passwd", "x")),
		"backslash":           with(file(`..\x`, "x")),
		"symbolic link":       with(link(tar.TypeSymlink, blob, "/etc/shadow")),
		"hard link":           with(link(tar.TypeLink, blob, "index.json")),
		"device":              with(link(tar.TypeChar, blob, "")),
		"pipe":                with(link(tar.TypeFifo, "pipe", "")),
		"blob twice":          with(file(blob, "x"), file(blob, "y")),
		"index twice":         with(file("index.json", "{}")),
		"no index":            without("index.json"),
		"no marker":           without("oci-layout"),
		"layout of the future": changed(func(e *entry) {
			*e = replaced(*e, "oci-layout",
				`{"imageLayoutVersion":"2.0.0"}`)
		}),
		"index that is no JSON": changed(func(e *entry) { *e = replaced(*e, "index.json", `{"manifests":`) }),
		"base that is no digest": changed(func(e *entry) {
			*e = replaced(*e, "index.json",
				`{"schemaVersion":2,"manifests":[],"annotations":{"`+registry.AnnotationBase+`":"../x"}}`)
		}),
		"altered manifest": changed(func(e *entry) {
			*e = replaced(*e, manifest,
				strings.Replace(e.body, "modules", "nodules", 1))
		}),
		"manifest too long": changed(func(e *entry) {
			*e = replaced(*e, manifest,
				e.body+strings.Repeat(" ", registry.MaxManifest))
		}),
		"empty": {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			refusesArchive(t, pack(t, entries...), s)
		})
	}
	whole := packed(t, good...)
	for name, raw := range map[string][]byte{
		"no tar":            []byte(strings.Repeat("not a tar ", 200)),
		"cut in a blob":     whole[:len(whole)-2000],
		"compressed by zst": append([]byte{0x28, 0xb5, 0x2f, 0xfd}, whole...),
		"holes":             sparse(t),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "x.tar")
			if err := os.WriteFile(path, raw, 0o600); err != nil {
				t.Fatal(err)
			}
			refusesArchive(t, path, s)
		})
	}
	if _, err := open(t, "oci-archive:"+filepath.Join(t.TempDir(), "none.tar")).Resolve(t.Context(),
		s.Digest); !fault.Is(err, fault.NotFound) {
		t.Errorf("Resolve in a file that is not there = %v; want kind not-found", err)
	}
}

func replaced(e entry, suffix, body string) entry {
	if !strings.HasSuffix(e.Name, suffix) {
		return e
	}
	return file(e.Name, body)
}

// sparse returns a tar with a file of type 'S': the old GNU sparse format (GNU tar manual, "Sparse Formats").
func sparse(t *testing.T) []byte {
	t.Helper()
	raw := packed(t, file("blobs/sha256/"+strings.Repeat("b", 64), "x"))
	raw[156] = 'S'
	sum := 0
	for i, b := range raw[:512] {
		if i >= 148 && i < 156 {
			b = ' '
		}
		sum += int(b)
	}
	copy(raw[148:156], []byte("0000000\x00"))
	for i, n := 5, sum; i >= 0; i, n = i-1, n>>3 {
		raw[148+i] = byte('0' + n&7)
	}
	raw[154], raw[155] = 0, ' '
	return raw
}

// refusesArchive checks that the manifest of the sample cannot be read from the tar, with an error of kind unverified.
func refusesArchive(t *testing.T, path string, s testkit.Sample) {
	t.Helper()
	raw, err := open(t, "oci-archive:"+path).Manifest(t.Context(), s.Digest)
	if !fault.Is(err, fault.Unverified) {
		t.Errorf("Manifest = %d bytes, %v; want kind unverified", len(raw), err)
	}
}

// TestArchiveAlteredBlob checks that Copy refuses a blob whose bytes do not have the blob's digest.
func TestArchiveAlteredBlob(t *testing.T) {
	t.Parallel()
	dir, s, _ := publishSample(t)
	all := folderEntries(t, dir)
	for i := range all {
		if strings.HasSuffix(all[i].Name, strings.TrimPrefix(s.Layers[0].Digest, "sha256:")) {
			all[i].body = strings.Repeat("x", len(all[i].body))
		}
	}
	from := open(t, "oci-archive:"+pack(t, all...))
	for name, to := range places(t) {
		if _, err := registry.Copy(t.Context(), from, to, s.Digest, nil); err == nil {
			t.Errorf("Copy of an altered blob to %s = nil; want an error", name)
		}
		if _, err := to.Resolve(t.Context(), s.Digest); !fault.Is(err, fault.NoArtifact) {
			t.Errorf("after that %s has %v; want nothing", name, err)
		}
	}
}

func isDriver(_ v1.Descriptor, m *v1.Manifest) bool {
	return m.Annotations[bundle.AnnotationFormat] != ""
}

// TestCopyTagged checks that a copy in each kind of repository has the digests, tags and attachments of its source.
func TestCopyTagged(t *testing.T) {
	t.Parallel()
	dir, s, key := publishSample(t)
	from := open(t, "oci-archive:"+pack(t, folderEntries(t, dir)...))
	for name, to := range places(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for range 2 { // the second time, the target has everything already
				got, err := registry.CopyTagged(t.Context(), from, to, isDriver, nil)
				if err != nil {
					t.Fatal(err)
				}
				want := []registry.Tagged{
					{Tag: bundle.Tag(s.Identity), Digest: s.Digest, Attached: 2},
					{Tag: bundle.KernelTag(s.Kernel, driver), Digest: s.Digest, Attached: 2},
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("CopyTagged (-want +got):\n%s", diff)
				}
			}
			checkContent(t, to, s)
			bundles, err := to.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := key.Verifier(t).Verify(bundles, s.Expect()); err != nil {
				t.Errorf("Verify of the copy = %v; want nil", err)
			}
			was, err := from.Referrers(t.Context(), s.Digest, "")
			if err != nil {
				t.Fatal(err)
			}
			is, err := to.Referrers(t.Context(), s.Digest, "")
			if err != nil || !cmp.Equal(digests(was), digests(is)) {
				t.Errorf("Referrers of the copy = %v, %v; want %v", digests(is), err, digests(was))
			}
		})
	}
	if got, err := registry.CopyTagged(t.Context(), from, open(t, "oci:"+t.TempDir()),
		func(v1.Descriptor, *v1.Manifest) bool { return false }, nil); err != nil || got != nil {
		t.Errorf("CopyTagged of nothing = %v, %v; want nothing", got, err)
	}
}

func digests(list []v1.Descriptor) (all []string) {
	for _, d := range list {
		all = append(all, d.Digest.String())
	}
	return all
}

// TestCopyLetsNoReferrerNameTags copies an attachment whose annotation names a tag into a layout. In a layout, this
// annotation sets a tag. The attachment must not get the tag.
func TestCopyLetsNoReferrerNameTags(t *testing.T) {
	t.Parallel()
	_, s, _ := publishSample(t)
	from := open(t, testkit.Registry(t, true)+"/prebake/driver")
	s.Publish(t, from)
	d, err := from.Resolve(t.Context(), s.Digest)
	if err != nil {
		t.Fatal(err)
	}
	tag := bundle.KernelTag(testkit.SampleKernel("50"), driver)
	if _, err := from.Attach(t.Context(), d, "application/vnd.test.hostile", []byte("x"),
		map[string]string{registry.AnnotationRefName: tag}); err != nil {
		t.Fatal(err)
	}
	to := open(t, "oci:"+t.TempDir())
	if c, err := registry.Copy(t.Context(), from, to, s.Digest, nil); err != nil || c.Referrers != 3 {
		t.Fatalf("Copy = %+v, %v; want 3 referrers", c, err)
	}
	if d, err := to.Resolve(t.Context(), tag); !fault.Is(err, fault.NoArtifact) {
		t.Errorf("Resolve(%s) = %v, %v; want nothing", tag, d.Digest, err)
	}
}
