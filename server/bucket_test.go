package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
)

// TestReindexBucket compares a bucket of published tarballs with a registry that has only some of their artifacts. Some
// files in the bucket have no trusted signature.
func TestReindexBucket(t *testing.T) {
	t.Parallel()
	r := newReindexed(t)
	farm, stranger, driver := r.farm, r.stranger, r.driver
	held := testkit.NewSample(t, farm, testkit.SampleKernel("47"), driver, "")
	held.Publish(t, r.repo)
	r.add(t, held, driver, held.Kernel)
	// This artifact is in the registry, but no trusted signer says that it fits its kernel.
	foreign := testkit.NewSample(t, stranger, testkit.SampleKernel("48"), driver, "")
	foreign.Publish(t, r.repo)

	gone := "sha256:" + strings.Repeat("d", 64)
	at := t.TempDir()
	entry := func(build, artifact string) tarball {
		return tarball{Driver: driver, Object: build + "/lakitu/nvidia-drivers-535.261.03.tgz", Artifact: artifact}
	}
	index := func(build string, key *testkit.Key, signedAs string, all ...tarball) {
		t.Helper()
		text, err := json.Marshal(tarballIndex{Format: 1, BuildID: build, Board: "lakitu", Drivers: all})
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(text)
		digest := hex.EncodeToString(sum[:])
		folder := filepath.Join(at, build, "lakitu")
		put(t, filepath.Join(folder, "index.json"), text)
		put(t, filepath.Join(folder, "nvidia-drivers-535.261.03.tgz"), []byte("tarball"))
		if key != nil {
			put(t, filepath.Join(folder, "index.json.sha256-"+digest+".sigstore.json"),
				key.Statement(t, "sha256:"+digest, bucketObject,
					map[string]string{"object": signedAs + "/lakitu/index.json", "buildId": signedAs, "board": "lakitu"}))
		}
	}
	index("17800.0.47", farm, "17800.0.47", entry("17800.0.47", held.Digest))
	index("17800.0.48", farm, "17800.0.48", entry("17800.0.48", foreign.Digest))
	index("17800.0.51", farm, "17800.0.51", entry("17800.0.51", gone))
	index("17800.0.52", farm, "17800.0.52", entry("17800.0.52", gone))
	// The registry has this artifact, but no statement for this COS build.
	index("17800.0.53", farm, "17800.0.53", entry("17800.0.53", held.Digest))
	index("17800.0.54", farm, "17800.0.54", entry("17800.0.54", ""))
	removed := entry("17800.0.55", held.Digest)
	removed.Object = "17800.0.55/lakitu/extensions/gpu/x.tgz"
	index("17800.0.55", farm, "17800.0.55", removed)
	// The following indexes are not trusted.
	index("17800.0.61", stranger, "17800.0.61", entry("17800.0.61", gone))
	index("17800.0.62", nil, "", entry("17800.0.62", gone))
	index("17800.0.63", farm, "17800.0.64", entry("17800.0.63", gone))
	index("17800.0.65", farm, "17800.0.65", entry("../17800.0.47", gone))
	put(t, filepath.Join(at, "17800.0.66/lakitu/index.json"), make([]byte, maxIndex+1))
	put(t, filepath.Join(at, "not-a-build/lakitu/index.json"), []byte("{}"))

	args := append(r.args(), "--apply", "--bucket", "file://"+at)
	got := lookAtBucket(t, fault.Unverified.ExitCode(), args...)
	if got.InBucket != 6 {
		t.Errorf("reindex counts %d tarballs; want 6", got.InBucket)
	}
	lostFor, others := map[string][]string{}, map[difference]int{}
	for _, f := range got.Findings {
		if f.Applied {
			t.Errorf("%+v is applied; want no record from a bucket", f)
		}
		if f.Difference != lost {
			others[f.Difference]++
			continue
		}
		lostFor[f.Digest] = slices.Sorted(maps.Keys(kernelSet(f.Kernels)))
	}
	wantLost := map[string][]string{
		foreign.Digest: {"17800.0.48/lakitu"},
		gone:           {"17800.0.51/lakitu", "17800.0.52/lakitu"},
		held.Digest:    {"17800.0.53/lakitu"},
		"":             {"17800.0.54/lakitu"},
	}
	if diff := cmp.Diff(wantLost, lostFor); diff != "" {
		t.Errorf("reindex finds lost (-want +got):\n%s", diff)
	}
	// Not trusted are five indexes, and the artifact that a stranger signed. The tarball of 17800.0.55 does not exist.
	if diff := cmp.Diff(map[difference]int{unverified: 6, absent: 1}, others); diff != "" {
		t.Errorf("reindex finds (-want +got):\n%s", diff)
	}
	if known, err := r.client.Artifacts(t.Context()); err != nil || len(known) != 1 {
		t.Errorf("reindex --bucket --apply left %d artifacts, %v; want 1", len(known), err)
	}
	if code, out, _ := run(t, args...); code != fault.Unverified.ExitCode() ||
		!strings.Contains(out, gone[7:19]+"  lost") ||
		!strings.Contains(out, "for 17800.0.51/lakitu and 1 more") {
		t.Errorf("reindex = %d\n%s\nwant 4, and what is lost", code, out)
	}
	if code, _, errs := run(t, append(args, "--bucket", "file://"+at+"/none")...); code != fault.InputMissing.ExitCode() {
		t.Errorf("reindex of a bucket that is not there = %d %s; want input-missing", code, errs)
	}
}

// TestReindexBuildersBucket reads testdata/bucket. Package builder/internal/tarball wrote this bucket, and a test of
// that package fails if the bucket is out of date.
func TestReindexBuildersBucket(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	url, _, _ := start(t, dir)
	at, err := filepath.Abs("testdata/bucket")
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"reindex", "--server", url, "--key", "testdata/bucket.pub"}
	got := lookAtBucket(t, fault.Mismatch.ExitCode(), append(args, "--bucket", "file://"+at)...)
	var index struct {
		Drivers []struct{ Artifact string }
	}
	text, err := os.ReadFile("testdata/bucket/17800.0.47/lakitu/index.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &index); err != nil {
		t.Fatal(err)
	}
	want := []finding{{Digest: index.Drivers[0].Artifact, Difference: lost,
		Driver:  target.Driver{Version: "535.261.03", Flavour: target.Open},
		Kernels: []target.Kernel{{BuildID: "17800.0.47", Board: "lakitu", Arch: target.AMD64}},
		Note:    "for 17800.0.47/lakitu"}}
	if diff := cmp.Diff(want, got.Findings, cmp.AllowUnexported(finding{})); diff != "" {
		t.Errorf("reindex finds (-want +got):\n%s", diff)
	}

	// Change one byte of the index, so that its signature is no longer valid.
	spoiled := t.TempDir()
	copyFolder(t, at, spoiled)
	put(t, filepath.Join(spoiled, "17800.0.47/lakitu/index.json"),
		[]byte(strings.Replace(string(text), "535.261.03", "535.261.04", 1)))
	got = lookAtBucket(t, fault.Unverified.ExitCode(), append(args, "--bucket", "file://"+spoiled)...)
	if len(got.Findings) != 1 || got.Findings[0].Difference != unverified || got.InBucket != 0 {
		t.Errorf("reindex of a spoiled index finds %+v; want it unverified", got.Findings)
	}
}

// TestPrintable checks that escape sequences from a registry do not reach the terminal.
func TestPrintable(t *testing.T) {
	t.Parallel()
	if got, want := printable("a\x1b[2Jé\nb\u202ec"), "a?[2Jé?b?c"; got != want {
		t.Errorf("printable() = %q; want %q", got, want)
	}
}

func lookAtBucket(t *testing.T, code int, args ...string) comparison {
	t.Helper()
	got, out, errs := run(t, append(args, "--output", "json")...)
	if got != code {
		t.Fatalf("%v = %d; want %d\n%s%s", args, got, code, out, errs)
	}
	var c comparison
	if err := json.Unmarshal([]byte(out), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

func put(t *testing.T, file string, text []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
}
