package tarball_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/gcs"
	"github.com/prebake/prebake/pkg/trust"
)

func TestPublish(t *testing.T) {
	eachStore(t, func(t *testing.T, dest string) {
		ctx := t.Context()
		s, pub := newSigner(t)
		v := verifier(t, s)
		b := openBucket(t, dest)
		r := newRelease(t, s, open, "")
		report, err := tarball.Publish(ctx, b, r)
		if err != nil || report.Existed ||
			!strings.HasSuffix(report.URL, "/17800.0.47/lakitu/nvidia-drivers-535.261.03.tgz") {
			t.Fatalf("Publish = %+v, %v; want a new tarball", report, err)
		}
		first := content(t, dest)
		check(t, first, v, open)

		// A second run packs and signs again, but must change nothing in the bucket.
		report, err = tarball.Publish(ctx, b, newReleaseAgain(t, r))
		if err != nil || !report.Existed {
			t.Fatalf("Publish again = %+v, %v; want existed", report, err)
		}
		if diff := cmp.Diff(first, content(t, dest)); diff != "" {
			t.Fatalf("publishing again changed (-before +after):\n%s", diff)
		}

		// Publish must refuse other bytes under the same name, the same bytes for another artifact, and another key.
		stranger, _ := newSigner(t)
		other := r
		other.Artifact = digestOf([]byte("x"))
		foreign := r
		foreign.Signer = stranger
		for name, bad := range map[string]tarball.Release{"other bytes": newRelease(t, s, open, "salt"),
			"other artifact": other, "other key": foreign} {
			if _, err := tarball.Publish(ctx, b, bad); !fault.Is(err, fault.PublishRefused) || fault.Hint(err) == "" {
				t.Errorf("%s: Publish = %v; want publish refused with a hint", name, err)
			}
			if diff := cmp.Diff(first, content(t, dest)); diff != "" {
				t.Fatalf("%s: a refused release changed (-before +after):\n%s", name, diff)
			}
		}

		// The farm signs with a new key, and its verifier still trusts the old key.
		rotated := r
		rotated.Signer = stranger
		if rotated.Verifier, err = trust.NewVerifier(trust.Policy{Keys: []trust.PublicKey{s.PublicKey(),
			stranger.PublicKey()}}); err != nil {
			t.Fatal(err)
		}
		if report, err := tarball.Publish(ctx, b, rotated); err != nil || !report.Existed {
			t.Errorf("Publish with a new key = %+v, %v; want existed", report, err)
		}

		// Publish two more drivers, one of them with a copy of NVIDIA's runfile.
		newer := newRelease(t, s, target.Driver{Version: "535.309.01", Flavour: target.Open}, "")
		newer.Runfile.Copy = true
		for _, r := range []tarball.Release{newRelease(t, s, proprietary, ""), newer} {
			if report, err := tarball.Publish(ctx, b, r); err != nil || report.Existed {
				t.Fatalf("Publish(%s) = %+v, %v", r.Driver, report, err)
			}
		}
		all := content(t, dest)
		check(t, all, v, open, proprietary, newer.Driver)
		if _, ok := all["17800.0.47/lakitu/extensions/gpu/nvidia-drivers-535.261.03-proprietary.tgz"]; !ok {
			t.Errorf("objects = %q; want the proprietary tarball under its own name", slices.Sorted(maps.Keys(all)))
		}
		checkReaders(t, dest)
		t.Run("cosign", func(t *testing.T) { cosign(t, all, pub) })
	})
}

var errCut = errors.New("the machine lost its network")

// cutAfter returns a function that returns nil n times, and then always errCut.
func cutAfter(n int) func() error {
	return func() error {
		if n--; n < 0 {
			return errCut
		}
		return nil
	}
}

// TestCutOffAnywhere interrupts Publish at every call to the bucket. The index must never list a missing object, and a
// second run must complete the bucket.
func TestCutOffAnywhere(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	v := verifier(t, s)
	r, before := newRelease(t, s, open, ""), newRelease(t, s, proprietary, "")
	r.Runfile.Copy = true
	for n := 0; ; n++ {
		m := tarball.NewMemory()
		b := m.Bucket()
		if _, err := tarball.Publish(t.Context(), b, before); err != nil {
			t.Fatal(err)
		}
		cut := cutAfter(n)
		_, err := tarball.Publish(t.Context(), tarball.Breaking(b, cut, cut), r)
		check(t, m.Content(), v)
		if err == nil {
			if n < 20 {
				t.Errorf("Publish made only %d calls; want 20 or more", n)
			}
			check(t, m.Content(), v, open, proprietary)
			return
		}
		if !errors.Is(err, errCut) {
			t.Fatalf("n=%d: Publish = %v; want %v", n, err, errCut)
		}
		if _, err := tarball.Publish(t.Context(), b, r); err != nil {
			t.Fatalf("n=%d: Publish again = %v", n, err)
		}
		check(t, m.Content(), v, open, proprietary)
		if t.Failed() {
			t.Fatalf("n=%d: the errors above are of publishing that was interrupted at this call", n)
		}
	}
}

// TestSideBySide publishes many drivers of one COS build at the same time. No list may lose an entry.
func TestSideBySide(t *testing.T) {
	eachStore(t, func(t *testing.T, dest string) {
		s, _ := newSigner(t)
		v := verifier(t, s)
		var want []target.Driver
		var g errgroup.Group
		for i := range 8 {
			d := target.Driver{Version: fmt.Sprintf("535.%d.01", 100+i), Flavour: target.Open}
			want = append(want, d)
			r, b := newRelease(t, s, d, ""), openBucket(t, dest)
			g.Go(func() error {
				_, err := tarball.Publish(t.Context(), b, r)
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		check(t, content(t, dest), v, want...)
	})
}

// TestLarge publishes a tarball that is so large that the storage library sends it in several parts.
func TestLarge(t *testing.T) {
	eachStore(t, func(t *testing.T, dest string) {
		s, _ := newSigner(t)
		v := verifier(t, s)
		r := newRelease(t, s, open, "")
		noise := make([]byte, 20<<20) // random bytes do not compress
		if _, err := rand.NewChaCha8([32]byte{1}).Read(noise); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(r.Modules, "nvidia.ko"), noise, 0o644); err != nil {
			t.Fatal(err)
		}
		for _, existed := range []bool{false, true} {
			if report, err := tarball.Publish(t.Context(), openBucket(t, dest), r); err != nil || report.Existed != existed {
				t.Fatalf("Publish = %+v, %v; want existed %v", report, err, existed)
			}
		}
		check(t, content(t, dest), v, open)
		noise[10<<20] ^= 1
		if err := os.WriteFile(filepath.Join(r.Modules, "nvidia.ko"), noise, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := tarball.Publish(t.Context(), openBucket(t, dest), r); !fault.Is(err, fault.PublishRefused) {
			t.Errorf("Publish with one bit changed = %v; want publish refused", err)
		}
		check(t, content(t, dest), v, open)
	})
}

// TestSameTwice publishes the same driver from four machines at the same time. All must succeed, and only one may have
// made the tarball.
func TestSameTwice(t *testing.T) {
	eachStore(t, func(t *testing.T, dest string) {
		s, _ := newSigner(t)
		v := verifier(t, s)
		r := newRelease(t, s, open, "")
		var made atomic.Int64
		var g errgroup.Group
		for range 4 {
			b := openBucket(t, dest)
			g.Go(func() error {
				report, err := tarball.Publish(t.Context(), b, r)
				for _, o := range report.Objects {
					if o.Name == tarball.TarballName(kernel, open) && !o.Existed {
						made.Add(1)
					}
				}
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		if made.Load() != 1 {
			t.Errorf("%d publishers say that they made the tarball; want 1", made.Load())
		}
		check(t, content(t, dest), v, open)
	})
}

// TestFromArtifact makes a tarball from an artifact in a repository.
func TestFromArtifact(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	s, _ := newSigner(t)
	v := verifier(t, s)
	repo, err := registry.Open("oci:"+filepath.Join(t.TempDir(), "layout"), registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	sample := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), proprietary, "")
	if _, err := repo.Push(ctx, sample.Image); err != nil {
		t.Fatal(err)
	}
	r, err := tarball.FromArtifact(ctx, repo, sample.Digest, t.TempDir())
	if err != nil || r.Driver != proprietary || r.Artifact != sample.Digest ||
		r.Fingerprint != sample.Identity.Fingerprint || r.Kernel.Arch != target.AMD64 {
		t.Fatalf("FromArtifact = %+v, %v", r, err)
	}
	r.Kernel, r.Signer = sample.Kernel, s
	dest := "file://" + filepath.Join(t.TempDir(), "bucket")
	b := openBucket(t, dest)
	has := func(d target.Driver, artifact string, want bool) {
		t.Helper()
		if got, err := tarball.Has(ctx, b, kernel, d, artifact); err != nil || got != want {
			t.Errorf("Has(%s of %s) = %v, %v; want %v", d, artifact, got, err, want)
		}
	}
	has(proprietary, sample.Digest, false)
	if _, err := tarball.Publish(ctx, b, r); err != nil {
		t.Fatal(err)
	}
	has(proprietary, sample.Digest, true)
	has(proprietary, digestOf(nil), false)
	has(open, sample.Digest, false)
	all := content(t, dest)
	check(t, all, v, proprietary)
	x, err := tarball.ParseIndex([]byte(all[tarball.IndexName(kernel)]))
	if err != nil || x.Drivers[0].Artifact != sample.Digest {
		t.Fatalf("index = %+v, %v; want artifact %s", x, err, sample.Digest)
	}
	var names []string
	for _, f := range x.Drivers[0].Files {
		names = append(names, f.Name)
	}
	if diff := cmp.Diff([]string{"drivers/nvidia-uvm.ko", "drivers/nvidia.ko", "firmware/nvidia/535.261.03/gsp_tu10x.bin"},
		names); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	if r, err := tarball.FromArtifact(ctx, repo, "sha256:"+strings.Repeat("0", 64), t.TempDir()); !fault.Is(err,
		fault.NoArtifact) {
		t.Errorf("FromArtifact(nothing) = %+v, %v; want kind no-artifact", r, err)
	}
}

func TestRefusesForeignIndex(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	stranger, _ := newSigner(t)
	dest := "file://" + filepath.Join(t.TempDir(), "bucket")
	b := openBucket(t, dest)
	if _, err := tarball.Publish(t.Context(), b, newRelease(t, stranger, proprietary, "")); err != nil {
		t.Fatal(err)
	}
	signed := content(t, dest)
	// In one bucket the index has a stranger's signature. In the other it has no signature.
	unsigned := "file://" + t.TempDir()
	write(t, filepath.Join(strings.TrimPrefix(unsigned, "file://"), tarball.IndexName(kernel)),
		signed[tarball.IndexName(kernel)])
	for _, dest := range []string{dest, unsigned} {
		before := content(t, dest)
		if _, err := tarball.Publish(t.Context(), openBucket(t, dest), newRelease(t, s, open, "")); !fault.Is(err,
			fault.PublishRefused) || fault.Hint(err) == "" {
			t.Errorf("Publish beside a foreign index = %v; want publish refused with a hint", err)
		}
		if diff := cmp.Diff(before, content(t, dest)); diff != "" {
			t.Errorf("a refused release changed (-before +after):\n%s", diff)
		}
	}
}

func TestRefusesRelease(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	for name, row := range map[string]struct {
		spoil func(r *tarball.Release)
		kind  fault.Kind
	}{
		"no build":       {func(r *tarball.Release) { r.Kernel.BuildID = "../x" }, fault.Usage},
		"no version":     {func(r *tarball.Release) { r.Driver.Version = "latest" }, fault.Usage},
		"no key":         {func(r *tarball.Release) { r.Signer = nil }, fault.Usage},
		"no modules":     {func(r *tarball.Release) { r.Modules = r.Scratch }, fault.Usage},
		"other firmware": {func(r *tarball.Release) { r.Driver.Version = "535.1.1" }, fault.Usage},
		"link among modules": {func(r *tarball.Release) { _ = os.Symlink("nvidia.ko", filepath.Join(r.Modules, "x.ko")) },
			fault.Usage},
		"changed runfile": {func(r *tarball.Release) { r.Runfile.Copy = true; r.Runfile.SHA256 = digestOf(nil) },
			fault.Checksum},
	} {
		dest := "file://" + filepath.Join(t.TempDir(), "bucket")
		r := newRelease(t, s, open, "")
		row.spoil(&r)
		if _, err := tarball.Publish(t.Context(), openBucket(t, dest), r); !fault.Is(err, row.kind) {
			t.Errorf("%s: Publish = %v (%v); want kind %v", name, err, fault.Of(err), row.kind)
		}
		if all := content(t, dest); len(all) > 0 {
			t.Errorf("%s: objects = %q; want none", name, slices.Sorted(maps.Keys(all)))
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	for _, dest := range []string{"", "x", "https://example.com/x", "gs://", "gs:///x", "gs://b/../x", "gs://b/a//b",
		"gs://user@b/x", "gs://b/x?y", "file://host/x", "file:x"} {
		if _, err := tarball.Open(t.Context(), dest); !fault.Is(err, fault.Usage) || fault.Hint(err) == "" &&
			!strings.HasPrefix(dest, "gs://b/") {
			t.Errorf("Open(%q) = %v; want kind usage with a hint", dest, err)
		}
		if got, want := tarball.Is(dest), strings.HasPrefix(dest, "gs:") || strings.HasPrefix(dest, "file:"); got != want {
			t.Errorf("Is(%q) = %v; want %v", dest, got, want)
		}
	}
	for _, repo := range []string{"oci:/x", "127.0.0.1:5000/prebake/driver", "europe-docker.pkg.dev/p/r/driver"} {
		if tarball.Is(repo) {
			t.Errorf("Is(%q) = true; it is a repository", repo)
		}
	}
}

// TestNoBucket checks that the error has a hint if the bucket does not exist.
func TestNoBucket(t *testing.T) {
	gcs.Start(t).Use(t)
	s, _ := newSigner(t)
	if _, err := tarball.Publish(t.Context(), openBucket(t, "gs://nowhere"), newRelease(t, s, open, "")); !fault.Is(err,
		fault.Usage) || fault.Hint(err) == "" {
		t.Errorf("Publish to a bucket that does not exist = %v (%v); want kind usage with a hint", err, fault.Of(err))
	}
}

func TestCancel(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	dest := "file://" + filepath.Join(t.TempDir(), "bucket")
	ctx, cancel := context.WithCancel(t.Context())
	b := tarball.Breaking(openBucket(t, dest), func() error { cancel(); return nil }, func() error { return nil })
	if _, err := tarball.Publish(ctx, b, newRelease(t, s, open, "")); !errors.Is(err, context.Canceled) {
		t.Errorf("Publish = %v; want cancelled", err)
	}
	if all := content(t, dest); len(all) > 0 {
		t.Errorf("objects = %q; want none", slices.Sorted(maps.Keys(all)))
	}
}

// TestRows checks that the release's list of GPUs decides which rows of gpu_driver_versions get the version.
func TestRows(t *testing.T) {
	t.Parallel()
	list, err := gpulist.ParseFile("570.1", []byte(`{"chips":[
		{"devid":"0x1DB1","name":"Tesla V100-SXM2-16GB","features":[]},
		{"devid":"0x2901","name":"NVIDIA B200","features":["kernelopen"]},
		{"devid":"0x2BB5","name":"NVIDIA RTX PRO 6000 Blackwell Server Edition","features":["kernelopen"]}]}`))
	if err != nil {
		t.Fatal(err)
	}
	s, _ := newSigner(t)
	dest := "file://" + filepath.Join(t.TempDir(), "bucket")
	var have string
	for _, row := range []string{"NVIDIA_TESLA_V100", "NVIDIA_B200", "NVIDIA_GB200", "NVIDIA_RTX_PRO_6000", "OTHERS"} {
		have += fmt.Sprintf("gpu_driver_version_info {\n  gpu_device {\n    gpu_type: %q\n  }\n}\n", row)
	}
	write(t, filepath.Join(strings.TrimPrefix(dest, "file://"), "17800.0.47/lakitu/gpu_driver_versions.textproto"), have)
	r := newRelease(t, s, target.Driver{Version: "570.1", Flavour: target.Open}, "")
	r.GPUs = list
	if _, err := tarball.Publish(t.Context(), openBucket(t, dest), r); err != nil {
		t.Fatal(err)
	}
	var got []string
	text := content(t, dest)["17800.0.47/lakitu/gpu_driver_versions.textproto"]
	for part := range strings.SplitSeq(text, "gpu_driver_version_info {") {
		if strings.Contains(part, "570.1") {
			got = append(got, strings.Split(part, `"`)[1])
		}
	}
	if diff := cmp.Diff([]string{"NVIDIA_B200", "NVIDIA_RTX_PRO_6000", "OTHERS", "NO_GPU"}, got); diff != "" {
		t.Errorf("rows with the version (-want +got):\n%s\n%s", diff, text)
	}
}
