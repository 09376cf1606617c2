package tarball_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/cosbucket"
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

// verifier returns a verifier that trusts only this signer.
func verifier(t testing.TB, s *sign.Signer) *trust.Verifier {
	t.Helper()
	v, err := s.Verifier()
	if err != nil {
		t.Fatal(err)
	}
	return v
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

// newRelease returns a release of a driver. Its modules contain the salt, so another salt gives another tarball.
func newRelease(t testing.TB, s *sign.Signer, d target.Driver, salt string) tarball.Release {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm"} {
		write(t, filepath.Join(dir, "modules", name+".ko"), name+" "+d.String()+salt)
	}
	write(t, filepath.Join(dir, "firmware", "firmware/nvidia", d.Version, "gsp_tu10x.bin"), strings.Repeat("gsp", 1000))
	write(t, filepath.Join(dir, "run"), "runfile of "+d.Version)
	return tarball.Release{
		Kernel: kernel, Driver: d, Fingerprint: target.Fingerprint(digestOf([]byte("kernel"))),
		Modules: filepath.Join(dir, "modules"), Firmware: filepath.Join(dir, "firmware"),
		Artifact: digestOf([]byte("artifact " + d.String() + salt)), Signer: s, Scratch: t.TempDir(),
		Runfile: &tarball.Runfile{Path: filepath.Join(dir, "run"), SHA256: digestOf([]byte("runfile of " + d.Version)),
			URI: "https://example.com/x.run"},
	}
}

func openBucket(t testing.TB, dest string) *tarball.Bucket {
	t.Helper()
	b, err := tarball.Open(t.Context(), dest)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// content returns the content of every object by name. It reads the bucket with the client for COS buckets.
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

// eachStore runs a test twice: with a folder, and with a bucket in an emulator of Google's Cloud Storage.
func eachStore(t *testing.T, test func(t *testing.T, dest string)) {
	t.Run("folder", func(t *testing.T) { test(t, "file://"+filepath.Join(t.TempDir(), "bucket")) })
	t.Run("bucket", func(t *testing.T) {
		s := gcs.Start(t)
		s.Use(t)
		s.Bucket(t, "twins")
		test(t, "gs://twins/of/drivers")
	})
}

// check verifies the bucket's index, if there is one. Every listed object must exist, match its digest and be signed
// for this COS build. If want is not empty, the index must list these drivers.
func check(t testing.TB, all map[string]string, v *trust.Verifier, want ...target.Driver) {
	t.Helper()
	text, ok := all[tarball.IndexName(kernel)]
	if !ok {
		if len(want) > 0 {
			t.Errorf("no index; want one with %v", want)
		}
		return
	}
	digest := digestOf([]byte(text))
	facts := tarball.ObjectFacts{Object: tarball.IndexName(kernel), BuildID: kernel.BuildID, Board: kernel.Board}
	name := tarball.IndexName(kernel) + ".sha256-" + digest[len("sha256:"):] + ".sigstore.json"
	if _, err := tarball.Verify(v, []byte(all[name]), digest, facts); err != nil {
		t.Errorf("signature of the index: %v", err)
	}
	x, err := tarball.ParseIndex([]byte(text))
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
		facts := tarball.ObjectFacts{Object: e.Object, BuildID: kernel.BuildID, Board: kernel.Board, Driver: &e.Driver,
			Artifact: e.Artifact, Fingerprint: e.Fingerprint}
		if _, err := tarball.Verify(v, []byte(all[e.Signature]), e.SHA256, facts); err != nil {
			t.Errorf("signature of %s: %v", e.Object, err)
		}
		if all[e.Object+".md5"] != e.MD5 ||
			all[e.Object+".sha256"] != e.SHA256[len("sha256:"):]+"  "+filepath.Base(e.Object)+"\n" {
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

// newReleaseAgain returns the same release in other folders, with other times and modes, as on another machine.
func newReleaseAgain(t testing.TB, r tarball.Release) tarball.Release {
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

// checkReaders reads the bucket as COS's installer, Prebake's builder and GNU tar read it.
func checkReaders(t *testing.T, dest string) {
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
	tgz, err := b.ReadSmall(t.Context(), tarball.TarballName(kernel, open), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	tar := exec.CommandContext(t.Context(), "tar", "--overwrite", "--xattrs", "--xattrs-include=*", "-xzf", "-", "-C", dir)
	tar.Stdin = bytes.NewReader(tgz)
	if out, err := tar.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("tar = %s, %v", out, err)
	}
	for name, want := range map[string]string{"drivers/nvidia-uvm.ko": "nvidia-uvm 535.261.03-open",
		"firmware/nvidia/535.261.03/gsp_tu10x.bin": strings.Repeat("gsp", 1000)} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s = %.40q, %v; want %.40q", name, got, err, want)
		}
	}
}

// cosign runs the program cosign. It must verify the objects without a network, and refuse another key and other bytes.
func cosign(t *testing.T, all map[string]string, pub string) {
	t.Helper()
	program, err := exec.LookPath("cosign")
	if err != nil {
		t.Skip("cosign is not on PATH: deploy/tool.sh builds it; make test runs this test with it")
	}
	dir := t.TempDir()
	name := tarball.TarballName(kernel, open)
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
			{"verify-blob-attestation", "--key", row.key, "--insecure-ignore-tlog=true", "--type", tarball.PredicateObject,
				"--bundle", "bundle", row.file},
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
