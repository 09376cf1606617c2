package symbols_test

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/symbols"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/distribution"
	"github.com/prebake/prebake/pkg/trust"
)

var driver = target.Driver{Version: "535.261.03", Flavour: target.Open}

const source = `
__attribute__((section(".modinfo"), used)) static const char vermagic[] = "vermagic=6.1.0 SMP ";
__attribute__((section(".modinfo"), used)) static const char name[] = "name=%s";
__attribute__((section(".gnu.linkonce.this_module"))) char this_module[64];
int answer(int x) { return x + %d; }
`

// compileObject makes an object with debug information and a build id. It returns the object, and a copy without debug
// information, which stands for the published module.
func compileObject(t *testing.T, name string, salt int) (debug, published string) {
	t.Helper()
	dir := t.TempDir()
	debug, published = filepath.Join(dir, name+".debug"), filepath.Join(dir, name+".ko")
	if err := os.WriteFile(filepath.Join(dir, "m.c"), fmt.Appendf(nil, source, name, salt), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"gcc", "-g", "-O1", "-c", "m.c", "-o", "m.o"},
		{"ld", "-r", "--build-id=sha1", "m.o", "-o", debug},
		{"strip", "--strip-debug", debug, "-o", published},
	} {
		cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	return debug, published
}

func newSigner(t *testing.T) *sign.Signer {
	t.Helper()
	key := filepath.Join(t.TempDir(), "key")
	if err := sign.GenerateKey(key); err != nil {
		t.Fatal(err)
	}
	s, err := sign.LoadSigner(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// newSet returns three published modules and the symbols of two of them.
func newSet(t *testing.T, id bundle.Identity, s *sign.Signer, salt int) symbols.Set {
	t.Helper()
	set := symbols.Set{Identity: id, Debug: map[string]string{}, Published: map[string]string{}, Signer: s,
		Scratch: t.TempDir()}
	for _, name := range []string{"nvidia", "nvidia-uvm"} {
		set.Debug[name], set.Published[name] = compileObject(t, name, salt)
	}
	// A published module may have no symbols. Here nvidia-drm has none.
	_, set.Published["nvidia-drm"] = compileObject(t, "nvidia-drm", salt)
	return set
}

// pushSample pushes an artifact without symbols to the repository at ref.
func pushSample(t *testing.T, ref string) (*registry.Repository, testkit.Sample, v1.Descriptor) {
	t.Helper()
	repo, err := registry.Open(ref, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	sample := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
	subject, err := repo.Push(t.Context(), sample.Image)
	if err != nil {
		t.Fatal(err)
	}
	return repo, sample, subject
}

func TestPublish(t *testing.T) {
	t.Parallel()
	for name, place := range map[string]func(t *testing.T) string{
		"registry":          func(t *testing.T) string { return testkit.Registry(t, true) + "/prebake/driver" },
		"without referrers": func(t *testing.T) string { return testkit.Registry(t, false) + "/prebake/driver" },
		"another registry":  func(t *testing.T) string { return distribution.Start(t) + "/prebake/driver" },
		"layout":            func(t *testing.T) string { return "oci:" + filepath.Join(t.TempDir(), "layout") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			repo, sample, _ := pushSample(t, place(t))
			signer := newSigner(t)
			set := newSet(t, sample.Identity, signer, 1)
			d, existed, err := symbols.Publish(ctx, repo, sample.Digest, set)
			if err != nil || existed {
				t.Fatalf("Publish = %v, %v, %v; want new symbols", d, existed, err)
			}
			check(t, repo, sample.Digest, d, set)
			again, existed, err := symbols.Publish(ctx, repo, sample.Digest, set)
			if err != nil || !existed || again.Digest != d.Digest {
				t.Errorf("Publish again = %v, %v, %v; want %s, existed", again, existed, err, d.Digest)
			}
			check(t, repo, sample.Digest, d, set)
			if name == "registry" { // anybody with the right to push can attach invalid statements
				testkit.AttachJunk(t, repo, d.Digest.String(), symbols.PredicateType)
				if _, existed, err := symbols.Publish(ctx, repo, sample.Digest, set); err != nil || !existed {
					t.Errorf("Publish beside junk: existed %v, %v; want that nothing is signed again", existed, err)
				}
				return
			}
			if _, _, err := symbols.Publish(ctx, repo, sample.Digest, newSet(t, sample.Identity, signer, 2)); !fault.Is(err,
				fault.PublishRefused) || fault.Hint(err) == "" {
				t.Errorf("Publish(others) = %v; want publish refused with a hint", err)
			}
			check(t, repo, sample.Digest, d, set)
			if left, err := os.ReadDir(set.Scratch); err != nil || len(left) > 0 {
				t.Errorf("left in the scratch folder: %v, %v", left, err)
			}
		})
	}
}

// check fetches the symbols from the registry, and finds them by build id as a person with a crash dump does.
func check(t *testing.T, repo *registry.Repository, digest string, d v1.Descriptor, set symbols.Set) {
	t.Helper()
	ctx := t.Context()
	list, err := repo.Referrers(ctx, digest, symbols.ArtifactType)
	if err != nil || len(list) != 1 || list[0].Digest != d.Digest {
		t.Fatalf("Referrers = %v, %v; want %s alone", list, err, d.Digest)
	}
	if attached, err := repo.Attached(ctx, digest, trust.ArtifactTypeBundle); err != nil || len(attached) != 0 {
		t.Errorf("the driver has %d statements, %v; want none: the statement about the symbols is attached to the symbols",
			len(attached), err)
	}
	v, err := set.Signer.Verifier()
	if err != nil {
		t.Fatal(err)
	}
	attached, err := repo.Attached(ctx, d.Digest.String(), trust.ArtifactTypeBundle)
	if err != nil || len(attached) != 1 {
		t.Fatalf("Attached = %d, %v; want one statement", len(attached), err)
	}
	st, err := v.Statement(attached[0])
	if err != nil || !st.About(d.Digest.String()) || st.PredicateType != symbols.PredicateType ||
		!strings.Contains(string(st.Predicate), digest) {
		t.Errorf("Statement = %+v, %v", st, err)
	}
	raw, err := repo.Manifest(ctx, d.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	layer, err := symbols.ParseManifest(raw)
	if err != nil {
		t.Fatal(err)
	}
	rc, err := repo.Blob(ctx, layer.Digest.String(), layer.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	dir := t.TempDir()
	tar := exec.CommandContext(ctx, "tar", "--zstd", "-xf", "-", "-C", dir)
	tar.Stdin = rc
	if out, err := tar.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	found, err := filepath.Glob(filepath.Join(dir, symbols.Folder, "*", "*.debug"))
	if err != nil || len(found) != len(set.Debug) {
		t.Fatalf("files = %v, %v; want %d", found, err, len(set.Debug))
	}
	// The build id of each published module must lead to its symbols.
	for name := range set.Debug {
		out, err := exec.CommandContext(ctx, "readelf", "-n", set.Published[name]).CombinedOutput()
		if err != nil {
			t.Fatal(err)
		}
		_, id, _ := strings.Cut(string(out), "Build ID: ")
		id = strings.TrimSpace(id)
		out, err = exec.CommandContext(ctx, "readelf", "-S", filepath.Join(dir, symbols.File(id))).CombinedOutput()
		if err != nil || !strings.Contains(string(out), ".debug_info") {
			t.Errorf("%s with build id %s: %v, %.200s; want debug information", name, id, err, out)
		}
	}
}

// TestStranger checks that Publish ignores symbols of an untrusted signer and publishes its own symbols beside them.
func TestStranger(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	repo, sample, subject := pushSample(t, testkit.Registry(t, true)+"/prebake/driver")
	if _, err := repo.Attach(ctx, subject, symbols.ArtifactType, []byte("junk"), nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := symbols.Publish(ctx, repo, sample.Digest, newSet(t, sample.Identity, newSigner(t), 1)); err != nil {
		t.Fatal(err)
	}
	set := newSet(t, sample.Identity, newSigner(t), 2)
	if _, existed, err := symbols.Publish(ctx, repo, sample.Digest, set); err != nil || existed {
		t.Errorf("Publish beside an untrusted signer's symbols = existed %v, %v; want new symbols", existed, err)
	}
}

// have checks the result of Have for a verifier that trusts only the given signer.
func have(t *testing.T, repo *registry.Repository, digest string, s *sign.Signer, want bool, when string) {
	t.Helper()
	v, err := s.Verifier()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := symbols.Have(t.Context(), repo, digest, v); err != nil || got != want {
		t.Errorf("%s: Have = %v, %v; want %v", when, got, err, want)
	}
}

// TestHave checks which symbols count: a trusted signer signed them for this artifact, and the registry has their
// layer. Invalid attachments must not count, and must not hide valid symbols.
func TestHave(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := filepath.Join(t.TempDir(), "layout")
	repo, sample, subject := pushSample(t, "oci:"+dir)
	stranger, signer := newSigner(t), newSigner(t)
	have(t, repo, sample.Digest, signer, false, "without symbols")
	for i := range registry.MaxAttachments + 8 {
		if _, err := repo.Attach(ctx, subject, symbols.ArtifactType, fmt.Appendf(nil, "junk %d", i), nil); err != nil {
			t.Fatal(err)
		}
	}
	broken, err := repo.Attach(ctx, subject, symbols.ArtifactType, []byte("damaged"), nil)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "blobs/sha256", broken.Digest.Hex), []byte("{}"), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := symbols.Publish(ctx, repo, sample.Digest, newSet(t, sample.Identity, stranger, 1)); err != nil {
		t.Fatal(err)
	}
	have(t, repo, sample.Digest, signer, false, "beside junk and a stranger's symbols")

	// Symbols that the signer signed for another artifact must not count.
	set := newSet(t, sample.Identity, signer, 2)
	other := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "other")
	if _, err := repo.Push(ctx, other.Image); err != nil {
		t.Fatal(err)
	}
	d, _, err := symbols.Publish(ctx, repo, other.Digest, set)
	if err != nil {
		t.Fatal(err)
	}
	have(t, repo, other.Digest, signer, true, "the other artifact")
	have(t, repo, sample.Digest, signer, false, "with symbols of another artifact only")

	if d, _, err = symbols.Publish(ctx, repo, sample.Digest, set); err != nil {
		t.Fatal(err)
	}
	have(t, repo, sample.Digest, signer, true, "with signed symbols")
	have(t, repo, sample.Digest, newSigner(t), false, "with symbols by another key")
	raw, err := repo.Manifest(ctx, d.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	layer, err := symbols.ParseManifest(raw)
	if err == nil {
		err = os.Remove(filepath.Join(dir, "blobs/sha256", layer.Digest.Hex))
	}
	if err != nil {
		t.Fatal(err)
	}
	have(t, repo, sample.Digest, signer, false, "without the layer")
}

// blobRequests counts the requests for one blob by HTTP method. If noHead is true, it answers 405 to HEAD requests.
type blobRequests struct {
	digest string
	noHead bool
	count  map[string]int
}

func (b *blobRequests) RoundTrip(r *http.Request) (*http.Response, error) {
	if !strings.HasSuffix(r.URL.Path, "/blobs/"+b.digest) {
		return http.DefaultTransport.RoundTrip(r)
	}
	b.count[r.Method]++
	if b.noHead && r.Method == http.MethodHead {
		return &http.Response{StatusCode: http.StatusMethodNotAllowed, Status: "405 Method Not Allowed", Body: http.NoBody,
			Request: r, Header: http.Header{}}, nil
	}
	return http.DefaultTransport.RoundTrip(r)
}

// TestHaveTransfersNoLayer checks that Have requests only the headers of the layer's response, because the layer may
// have hundreds of megabytes.
func TestHaveTransfersNoLayer(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	ref := distribution.Start(t) + "/prebake/driver"
	repo, sample, _ := pushSample(t, ref)
	signer := newSigner(t)
	d, _, err := symbols.Publish(ctx, repo, sample.Digest, newSet(t, sample.Identity, signer, 1))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := repo.Manifest(ctx, d.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	layer, err := symbols.ParseManifest(raw)
	if err != nil {
		t.Fatal(err)
	}
	for _, noHead := range []bool{false, true} {
		want := map[string]int{http.MethodHead: 1}
		if noHead {
			want[http.MethodGet] = 1
		}
		seen := &blobRequests{layer.Digest.String(), noHead, map[string]int{}}
		if repo, err = registry.Open(ref, registry.Options{Transport: seen}); err != nil {
			t.Fatal(err)
		}
		have(t, repo, sample.Digest, signer, true, "on a registry")
		if diff := cmp.Diff(want, seen.count); diff != "" {
			t.Errorf("without HEAD %t: requests for the layer (-want +got):\n%s", noHead, diff)
		}
	}
}

func TestRefuses(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	repo, sample, _ := pushSample(t, "oci:"+filepath.Join(t.TempDir(), "layout"))
	signer := newSigner(t)
	otherDebug, _ := compileObject(t, "nvidia", 7)
	for name, row := range map[string]struct {
		spoil  func(s *symbols.Set)
		digest string
		kind   fault.Kind
	}{
		"no key":             {func(s *symbols.Set) { s.Signer = nil }, sample.Digest, fault.Usage},
		"no symbols":         {func(s *symbols.Set) { s.Debug = nil }, sample.Digest, fault.Usage},
		"other module":       {func(s *symbols.Set) { delete(s.Published, "nvidia") }, sample.Digest, fault.CheckFailed},
		"other bytes":        {func(s *symbols.Set) { s.Debug["nvidia"] = otherDebug }, sample.Digest, fault.CheckFailed},
		"no such artifact":   {func(*symbols.Set) {}, "sha256:" + strings.Repeat("0", 64), fault.NoArtifact},
		"without a build id": {func(s *symbols.Set) { strip(t, s.Debug["nvidia"]) }, sample.Digest, fault.CheckFailed},
	} {
		set := newSet(t, sample.Identity, signer, 1)
		row.spoil(&set)
		if _, _, err := symbols.Publish(ctx, repo, row.digest, set); !fault.Is(err, row.kind) {
			t.Errorf("%s: Publish = %v (%v); want kind %v", name, err, fault.Of(err), row.kind)
		}
	}
	if list, err := repo.Referrers(ctx, sample.Digest, symbols.ArtifactType); err != nil || len(list) > 0 {
		t.Errorf("Referrers = %v, %v; want none", list, err)
	}
}

// strip removes the build id from a file.
func strip(t *testing.T, file string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "objcopy", "--remove-section=.note.gnu.build-id",
		file).CombinedOutput(); err != nil {
		t.Fatalf("objcopy: %v\n%s", err, out)
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"artifactType":"` + symbols.ArtifactType + `","layers":[{"mediaType":"` +
		bundle.MediaTypeLayer + `","size":1,"digest":"sha256:` + strings.Repeat("a", 64) + `"}],"subject":{}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if l, err := symbols.ParseManifest(raw); err == nil && string(l.MediaType) != bundle.MediaTypeLayer {
			t.Errorf("ParseManifest = %+v", l)
		}
	})
}
