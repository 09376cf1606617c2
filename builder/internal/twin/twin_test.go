package twin_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/twin"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/gcs"
	"github.com/prebake/prebake/pkg/trust"
)

var (
	kernel      = target.Kernel{BuildID: "17800.0.47", Board: "lakitu", Arch: target.AMD64}
	open        = target.Driver{Version: "535.261.03", Flavour: target.Open}
	proprietary = target.Driver{Version: "535.261.03", Flavour: target.Proprietary}
)

func newSigner(t testing.TB) (s *sign.Signer, pub string) {
	t.Helper()
	key := filepath.Join(t.TempDir(), "key")
	if err := sign.GenerateKey(key); err != nil {
		t.Fatal(err)
	}
	s, err := sign.LoadSigner(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return s, key + ".pub"
}

func write(t testing.TB, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// newRelease returns a driver whose modules hold salt.
func newRelease(t testing.TB, s *sign.Signer, d target.Driver, salt string) twin.Release {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm"} {
		write(t, filepath.Join(dir, "modules", name+".ko"), name+" "+d.String()+salt)
	}
	write(t, filepath.Join(dir, "firmware", "firmware/nvidia", d.Version, "gsp_tu10x.bin"), strings.Repeat("gsp", 1000))
	write(t, filepath.Join(dir, "run"), "runfile of "+d.Version)
	return twin.Release{
		Kernel: kernel, Driver: d, Fingerprint: target.Fingerprint(digestOf([]byte("kernel"))),
		Modules: filepath.Join(dir, "modules"), Firmware: filepath.Join(dir, "firmware"),
		Artifact: digestOf([]byte("artifact " + d.String() + salt)), Signer: s, Scratch: t.TempDir(),
		Runfile: &twin.Runfile{Path: filepath.Join(dir, "run"), SHA256: digestOf([]byte("runfile of " + d.Version)), URI: "https://example.com/x.run"},
	}
}

func openBucket(t testing.TB, dest string) *twin.Bucket {
	t.Helper()
	b, err := twin.Open(t.Context(), dest)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// content returns every object, as a reader of COS buckets sees it.
func content(t testing.TB, dest string) map[string]string {
	t.Helper()
	b, err := cosbucket.Open(t.Context(), dest)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	names, err := b.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, name := range names {
		if strings.HasPrefix(name, ".prebake/") {
			continue
		}
		rc, _, err := b.Get(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(rc)
		if err = errors.Join(err, rc.Close()); err != nil {
			t.Fatal(err)
		}
		all[name] = string(data)
	}
	return all
}

// places runs a test in a folder and in a bucket of a real emulator.
func places(t *testing.T, test func(t *testing.T, dest string)) {
	t.Run("folder", func(t *testing.T) { test(t, "file://"+filepath.Join(t.TempDir(), "bucket")) })
	t.Run("bucket", func(t *testing.T) {
		s := gcs.Start(t)
		s.Use(t)
		s.Bucket(t, "twins")
		test(t, "gs://twins/of/drivers")
	})
}

// check says what is wrong with a bucket whose index should be whole: every
// object that it names is there, is what it says and is signed for this build.
func check(t testing.TB, all map[string]string, v *trust.Verifier, want ...target.Driver) {
	t.Helper()
	text, ok := all[twin.IndexName(kernel)]
	if !ok {
		if len(want) > 0 {
			t.Errorf("no index; want one with %v", want)
		}
		return
	}
	digest := digestOf([]byte(text))
	facts := twin.ObjectFacts{Object: twin.IndexName(kernel), BuildID: kernel.BuildID, Board: kernel.Board}
	name := twin.IndexName(kernel) + ".sha256-" + digest[len("sha256:"):] + ".sigstore.json"
	if _, err := twin.Verify(v, []byte(all[name]), digest, facts); err != nil {
		t.Errorf("signature of the index: %v", err)
	}
	x, err := twin.ParseIndex([]byte(text))
	if err != nil {
		t.Fatalf("index: %v", err)
	}
	var have []target.Driver
	for _, e := range x.Drivers {
		have = append(have, e.Driver)
		tgz := all[e.Object]
		if got := digestOf([]byte(tgz)); got != e.SHA256 || int64(len(tgz)) != e.Size {
			t.Errorf("%s has %s, %d bytes; the index says %s, %d", e.Object, got, len(tgz), e.SHA256, e.Size)
		}
		facts := twin.ObjectFacts{Object: e.Object, BuildID: kernel.BuildID, Board: kernel.Board, Driver: &e.Driver, Artifact: e.Artifact, Fingerprint: e.Fingerprint}
		if _, err := twin.Verify(v, []byte(all[e.Signature]), e.SHA256, facts); err != nil {
			t.Errorf("signature of %s: %v", e.Object, err)
		}
		if all[e.Object+".md5"] != e.MD5 || all[e.Object+".sha256"] != e.SHA256[len("sha256:"):]+"  "+filepath.Base(e.Object)+"\n" {
			t.Errorf("sums of %s: %q, %q", e.Object, all[e.Object+".md5"], all[e.Object+".sha256"])
		}
		if e.Flavour == target.Open {
			for _, file := range []string{"textproto", "bin"} {
				if text := all["17800.0.47/lakitu/gpu_driver_versions."+file]; !strings.Contains(text, e.Version) {
					t.Errorf("gpu_driver_versions.%s = %q; want %s in it, since the index has it", file, text, e.Version)
				}
			}
		}
	}
	if len(want) > 0 {
		if diff := cmp.Diff(want, have); diff != "" {
			t.Errorf("drivers of the index (-want +got):\n%s", diff)
		}
	}
}

func TestPublish(t *testing.T) {
	places(t, func(t *testing.T, dest string) {
		ctx := t.Context()
		s, pub := newSigner(t)
		v, err := s.Verifier()
		if err != nil {
			t.Fatal(err)
		}
		b := openBucket(t, dest)
		r := newRelease(t, s, open, "")
		report, err := twin.Publish(ctx, b, r)
		if err != nil || report.Existed || !strings.HasSuffix(report.URL, "/17800.0.47/lakitu/nvidia-drivers-535.261.03.tgz") {
			t.Fatalf("Publish = %+v, %v; want a new tarball", report, err)
		}
		first := content(t, dest)
		check(t, first, v, open)

		// Another run packs and signs again, and changes nothing.
		report, err = twin.Publish(ctx, b, newReleaseAgain(t, r))
		if err != nil || !report.Existed {
			t.Fatalf("Publish again = %+v, %v; want existed", report, err)
		}
		if diff := cmp.Diff(first, content(t, dest)); diff != "" {
			t.Fatalf("publishing again changed (-before +after):\n%s", diff)
		}

		// Other bytes under the same name, another artifact with the same bytes,
		// and another key.
		stranger, _ := newSigner(t)
		other := r
		other.Artifact = digestOf([]byte("x"))
		foreign := r
		foreign.Signer = stranger
		for name, bad := range map[string]twin.Release{"other bytes": newRelease(t, s, open, "salt"), "other artifact": other, "other key": foreign} {
			if _, err := twin.Publish(ctx, b, bad); !fault.Is(err, fault.PublishRefused) || fault.Hint(err) == "" {
				t.Errorf("%s: Publish = %v; want publish refused with a hint", name, err)
			}
			if diff := cmp.Diff(first, content(t, dest)); diff != "" {
				t.Fatalf("%s: a refused release changed (-before +after):\n%s", name, diff)
			}
		}

		// The key changes, and the old one is still trusted.
		rotated := r
		rotated.Signer = stranger
		if rotated.Verifier, err = trust.NewVerifier(trust.Policy{Keys: []trust.PublicKey{s.PublicKey(), stranger.PublicKey()}}); err != nil {
			t.Fatal(err)
		}
		if report, err := twin.Publish(ctx, b, rotated); err != nil || !report.Existed {
			t.Errorf("Publish with a new key = %+v, %v; want existed", report, err)
		}

		// More drivers, one of them with NVIDIA's runfile.
		newer := newRelease(t, s, target.Driver{Version: "535.309.01", Flavour: target.Open}, "")
		newer.Runfile.Copy = true
		for _, r := range []twin.Release{newRelease(t, s, proprietary, ""), newer} {
			if report, err := twin.Publish(ctx, b, r); err != nil || report.Existed {
				t.Fatalf("Publish(%s) = %+v, %v", r.Driver, report, err)
			}
		}
		all := content(t, dest)
		check(t, all, v, open, proprietary, newer.Driver)
		if _, ok := all["17800.0.47/lakitu/extensions/gpu/nvidia-drivers-535.261.03-proprietary.tgz"]; !ok {
			t.Errorf("objects = %q; want the proprietary tarball under its own name", slices.Sorted(maps.Keys(all)))
		}
		readers(t, dest)
		cosign(t, all, pub)
	})
}

// newReleaseAgain is the same release on another machine: other folders, times
// and modes.
func newReleaseAgain(t testing.TB, r twin.Release) twin.Release {
	t.Helper()
	for _, dir := range []*string{&r.Modules, &r.Firmware} {
		to := t.TempDir()
		if err := os.CopyFS(to, os.DirFS(*dir)); err != nil {
			t.Fatal(err)
		}
		*dir = to
	}
	if err := os.Chmod(filepath.Join(r.Modules, "nvidia.ko"), 0o600); err != nil {
		t.Fatal(err)
	}
	return r
}

// readers look at the bucket as COS's installer, our builder and GNU tar do.
func readers(t *testing.T, dest string) {
	t.Helper()
	b, err := cosbucket.Open(t.Context(), dest)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	list, err := b.Drivers(t.Context(), kernel)
	if err != nil || !slices.Equal(list.Versions, []string{"535.261.03", "535.309.01"}) || list.Default != "" {
		t.Errorf("Drivers = %+v, %v; want both open versions and no default", list, err)
	}
	drivers, err := cosbucket.Open(t.Context(), dest+"/drivers")
	if err != nil {
		t.Fatal(err)
	}
	defer drivers.Close()
	run, err := drivers.ReadSmall(t.Context(), cosbucket.RunfileName("535.309.01", target.AMD64), 1<<20)
	if err != nil || string(run) != "runfile of 535.309.01" {
		t.Errorf("runfile = %q, %v", run, err)
	}
	sum, err := drivers.ReadSmall(t.Context(), cosbucket.RunfileSumName("535.309.01", target.AMD64), 1<<10)
	if err != nil || !strings.HasPrefix(string(sum), digestOf(run)[len("sha256:"):]) {
		t.Errorf("sum of the runfile = %q, %v", sum, err)
	}
	dir := t.TempDir()
	tgz, err := b.ReadSmall(t.Context(), twin.TarballName(kernel, open), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	tar := exec.CommandContext(t.Context(), "tar", "--overwrite", "--xattrs", "--xattrs-include=*", "-xzf", "-", "-C", dir)
	tar.Stdin = bytes.NewReader(tgz)
	if out, err := tar.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("tar = %s, %v", out, err)
	}
	for name, want := range map[string]string{"drivers/nvidia-uvm.ko": "nvidia-uvm 535.261.03-open", "firmware/nvidia/535.261.03/gsp_tu10x.bin": strings.Repeat("gsp", 1000)} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s = %.40q, %v; want %.40q", name, got, err, want)
		}
	}
}

// cosign verifies what is published, offline, and refuses another key and
// other bytes.
func cosign(t *testing.T, all map[string]string, pub string) {
	t.Helper()
	program, err := exec.LookPath("cosign")
	if err != nil {
		t.Log("cosign is not on PATH: not asked")
		return
	}
	dir := t.TempDir()
	name := twin.TarballName(kernel, open)
	write(t, filepath.Join(dir, "tgz"), all[name])
	write(t, filepath.Join(dir, "other"), all[name]+"x")
	write(t, filepath.Join(dir, "bundle"), all[name+".sigstore.json"])
	_, otherPub := newSigner(t)
	for _, row := range []struct {
		key, file string
		ok        bool
	}{{pub, "tgz", true}, {pub, "other", false}, {otherPub, "tgz", false}} {
		for _, args := range [][]string{
			{"verify-blob", "--key", row.key, "--insecure-ignore-tlog=true", "--bundle", "bundle", row.file},
			{"verify-blob-attestation", "--key", row.key, "--insecure-ignore-tlog=true", "--type", twin.PredicateObject, "--bundle", "bundle", row.file},
		} {
			cmd := exec.CommandContext(t.Context(), program, args...)
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "HOME="+t.TempDir(), "HTTPS_PROXY=http://127.0.0.1:1")
			if out, err := cmd.CombinedOutput(); (err == nil) != row.ok {
				t.Errorf("cosign %s = %v; want success %v\n%s", strings.Join(args, " "), err, row.ok, out)
			}
		}
	}
}

var errCut = errors.New("the machine lost its network")

// TestCutOffAnywhere ends publishing at every call, before and after it took
// effect, looks that the index promises nothing that is not there, and
// publishes again.
func TestCutOffAnywhere(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	v, err := s.Verifier()
	if err != nil {
		t.Fatal(err)
	}
	r, before := newRelease(t, s, open, ""), newRelease(t, s, proprietary, "")
	r.Runfile.Copy = true
	for n := 0; ; n++ {
		m := twin.NewMemory()
		b := m.Bucket()
		if _, err := twin.Publish(t.Context(), b, before); err != nil {
			t.Fatal(err)
		}
		left := n
		cut := func() error {
			if left--; left < 0 {
				return errCut
			}
			return nil
		}
		_, err := twin.Publish(t.Context(), twin.Breaking(b, cut, cut), r)
		check(t, m.Content(), v)
		if err == nil {
			if n < 20 {
				t.Errorf("Publish made only %d calls; did the cut work?", n)
			}
			check(t, m.Content(), v, open, proprietary)
			return
		}
		if !errors.Is(err, errCut) {
			t.Fatalf("n=%d: Publish = %v; want the cause", n, err)
		}
		if _, err := twin.Publish(t.Context(), b, r); err != nil {
			t.Fatalf("n=%d: Publish again = %v", n, err)
		}
		check(t, m.Content(), v, open, proprietary)
		if t.Failed() {
			t.Fatalf("n=%d", n)
		}
	}
}

// TestSideBySide publishes many drivers of one build at once, each with a
// connection of its own: no list loses anybody's entry.
func TestSideBySide(t *testing.T) {
	places(t, func(t *testing.T, dest string) {
		s, _ := newSigner(t)
		v, err := s.Verifier()
		if err != nil {
			t.Fatal(err)
		}
		var want []target.Driver
		var g errgroup.Group
		for i := range 8 {
			d := target.Driver{Version: fmt.Sprintf("535.%d.01", 100+i), Flavour: target.Open}
			want = append(want, d)
			r, b := newRelease(t, s, d, ""), openBucket(t, dest)
			g.Go(func() error {
				_, err := twin.Publish(t.Context(), b, r)
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		check(t, content(t, dest), v, want...)
	})
}

// TestSameTwice lets two machines publish the same at once: both succeed.
func TestSameTwice(t *testing.T) {
	places(t, func(t *testing.T, dest string) {
		s, _ := newSigner(t)
		v, err := s.Verifier()
		if err != nil {
			t.Fatal(err)
		}
		r := newRelease(t, s, open, "")
		var made atomic.Int64
		var g errgroup.Group
		for range 4 {
			b := openBucket(t, dest)
			g.Go(func() error {
				report, err := twin.Publish(t.Context(), b, r)
				for _, o := range report.Objects {
					if o.Name == twin.TarballName(kernel, open) && !o.Existed {
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

func TestRefusesForeignIndex(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	stranger, _ := newSigner(t)
	dest := "file://" + filepath.Join(t.TempDir(), "bucket")
	b := openBucket(t, dest)
	if _, err := twin.Publish(t.Context(), b, newRelease(t, stranger, proprietary, "")); err != nil {
		t.Fatal(err)
	}
	signed := content(t, dest)
	// One that somebody else signed, and one that nobody did.
	unsigned := "file://" + t.TempDir()
	write(t, filepath.Join(strings.TrimPrefix(unsigned, "file://"), twin.IndexName(kernel)), signed[twin.IndexName(kernel)])
	for _, dest := range []string{dest, unsigned} {
		before := content(t, dest)
		if _, err := twin.Publish(t.Context(), openBucket(t, dest), newRelease(t, s, open, "")); !fault.Is(err, fault.PublishRefused) || fault.Hint(err) == "" {
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
		spoil func(r *twin.Release)
		kind  fault.Kind
	}{
		"no build":           {func(r *twin.Release) { r.Kernel.BuildID = "../x" }, fault.Usage},
		"no version":         {func(r *twin.Release) { r.Driver.Version = "latest" }, fault.Usage},
		"no key":             {func(r *twin.Release) { r.Signer = nil }, fault.Usage},
		"no modules":         {func(r *twin.Release) { r.Modules = r.Scratch }, fault.Usage},
		"other firmware":     {func(r *twin.Release) { r.Driver.Version = "535.1.1" }, fault.Usage},
		"link among modules": {func(r *twin.Release) { _ = os.Symlink("nvidia.ko", filepath.Join(r.Modules, "x.ko")) }, fault.Usage},
		"changed runfile":    {func(r *twin.Release) { r.Runfile.Copy = true; r.Runfile.SHA256 = digestOf(nil) }, fault.Checksum},
	} {
		dest := "file://" + filepath.Join(t.TempDir(), "bucket")
		r := newRelease(t, s, open, "")
		row.spoil(&r)
		if _, err := twin.Publish(t.Context(), openBucket(t, dest), r); !fault.Is(err, row.kind) {
			t.Errorf("%s: Publish = %v (%v); want kind %v", name, err, fault.Of(err), row.kind)
		}
		if all := content(t, dest); len(all) > 0 {
			t.Errorf("%s: objects = %q; want none", name, slices.Sorted(maps.Keys(all)))
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	for _, dest := range []string{"", "x", "https://example.com/x", "gs://", "gs:///x", "gs://b/../x", "gs://b/a//b", "gs://user@b/x", "gs://b/x?y", "file://host/x", "file:x"} {
		if _, err := twin.Open(t.Context(), dest); !fault.Is(err, fault.Usage) || fault.Hint(err) == "" && !strings.HasPrefix(dest, "gs://b/") {
			t.Errorf("Open(%q) = %v; want kind usage with a hint", dest, err)
		}
		if got, want := twin.Is(dest), strings.HasPrefix(dest, "gs:") || strings.HasPrefix(dest, "file:"); got != want {
			t.Errorf("Is(%q) = %v; want %v", dest, got, want)
		}
	}
	for _, repo := range []string{"oci:/x", "127.0.0.1:5000/prebake/driver", "europe-docker.pkg.dev/p/r/driver"} {
		if twin.Is(repo) {
			t.Errorf("Is(%q) = true; it is a repository", repo)
		}
	}
}

// A bucket that is not there is told as such.
func TestNoBucket(t *testing.T) {
	gcs.Start(t).Use(t)
	s, _ := newSigner(t)
	if _, err := twin.Publish(t.Context(), openBucket(t, "gs://nowhere"), newRelease(t, s, open, "")); !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
		t.Errorf("Publish to a bucket that is not there = %v (%v); want kind usage with a hint", err, fault.Of(err))
	}
}

func TestCancel(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	dest := "file://" + filepath.Join(t.TempDir(), "bucket")
	ctx, cancel := context.WithCancel(t.Context())
	b := twin.Breaking(openBucket(t, dest), func() error { cancel(); return nil }, func() error { return nil })
	if _, err := twin.Publish(ctx, b, newRelease(t, s, open, "")); !errors.Is(err, context.Canceled) {
		t.Errorf("Publish = %v; want cancelled", err)
	}
	if all := content(t, dest); len(all) > 0 {
		t.Errorf("objects = %q; want none", slices.Sorted(maps.Keys(all)))
	}
}

// The list of GPUs decides in which rows of gpu_driver_versions a version goes.
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
	if _, err := twin.Publish(t.Context(), openBucket(t, dest), r); err != nil {
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
