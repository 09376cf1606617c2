package e2e

import (
	"crypto/md5" //nolint:gosec // the checksum that COS's buckets have
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// TestLoadTestOnVMLinux uses a bucket with vmlinux and without a boot archive, like COS's. The load test must boot
// exactly that vmlinux, with Prebake's own entry code, and the signed result must say so. The build uses no verdict of
// an earlier run.
func TestLoadTestOnVMLinux(t *testing.T) {
	t.Parallel()
	if shared.passes.remembered(t, "builder", "server", "fetcher") {
		return
	}
	defer shared.turns.take(30)()
	k, other := shared.kernel(1), shared.kernel(0)
	abi := func(id string) string {
		_, after, _ := strings.Cut(id, ".")
		_, after, _ = strings.Cut(after, ".")
		if _, err := strconv.Atoi(after); err != nil {
			t.Fatalf("BUILD_ID %s: %v", id, err)
		}
		return after
	}
	dir := t.TempDir()
	if _, err := shared.Must(t.Context(), "mirror", "--out", dir, "--cache", filepath.Join(shared.State, "packages"),
		"--only-kernels",
		"--kernel-abi", abi(other.BuildID)+","+abi(k.BuildID), "--vmlinux", "--no-boot-archive"); err != nil {
		t.Fatal(err)
	}
	at := func(id, name string) string { return filepath.Join(dir, "cos", id, k.Board, name) }
	if _, err := os.Stat(at(k.BuildID, "prebake-boot.tgz")); !os.IsNotExist(err) {
		t.Fatalf("the bucket has an archive to boot from: %v", err)
	}
	// The cache has the modules, but no verdict of an earlier load test and nothing that was made of vmlinux.
	mustBuild(t, shared.srv, k, shared.driver(), target.Proprietary)
	cache := linkCache(t, "driver-", "headers-", "toolchain-", "modules", "userspace", "firmware", "layer-", "fetched-",
		"tree-digest-")
	layout := filepath.Join(t.TempDir(), "layout")
	build := func() (*testbed.Result, error) {
		return shared.Run(t.Context(), "builder", "build", "--build-id", k.BuildID, "--board", k.Board, "--driver",
			shared.driver(), "--flavour", "proprietary",
			"--kernel-mirror", "file://"+filepath.Join(dir, "cos"), "--driver-mirror", shared.mirror.DriverURL(),
			"--cache", cache, "--key", shared.key, "--to", "oci:"+layout, "--load-test", "require", "--output", "json")
	}
	res, err := build()
	if err != nil || res.Code != 0 {
		t.Fatalf("build = %d, %v\n%s", res.Code, err, res.Stderr)
	}
	// The cache now has the verdict of a load test, so this build booted a machine.
	if verdicts, err := os.ReadDir(filepath.Join(cache, "facts", "loadtest")); err != nil || len(verdicts) != 1 {
		t.Errorf("after the build the cache has %d verdicts, %v; want one", len(verdicts), err)
	}
	var got struct {
		LoadTest struct {
			State, NVMLVersion string
		} `json:"loadTest"`
	}
	if err := json.Unmarshal(res.Stdout, &got); err != nil || got.LoadTest.State != "loaded" ||
		got.LoadTest.NVMLVersion != shared.driver() {
		t.Errorf("load test = %+v, %v; want it loaded, and NVML to answer %s", got.LoadTest, err, shared.driver())
	}
	image, err := os.ReadFile(at(k.BuildID, "vmlinux"))
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(image)
	signed := allBlobs(t, layout)
	if !strings.Contains(signed, hex.EncodeToString(digest[:])) || !strings.Contains(signed, "gnuBuildID") {
		t.Error("no signed statement has the digest and the build id of the vmlinux that was booted")
	}

	inspect := func() (*testbed.Result, error) {
		return shared.Run(t.Context(), "builder", "inspect", "--build-id", k.BuildID, "--board", k.Board, "--vmlinux",
			"--kernel-mirror", "file://"+filepath.Join(dir, "cos"), "--driver-mirror", shared.mirror.DriverURL(), "--cache",
			cache)
	}
	if res, err = inspect(); err != nil || res.Code != 0 ||
		!strings.Contains(string(res.Stdout), "boots vmlinux, of which ") {
		t.Errorf("inspect = %d, %v\n%s", res.Code, err, res.Stdout)
	}

	// Now the test replaces the vmlinux in the bucket by that of another COS build, with a matching checksum.
	foreign, err := os.ReadFile(at(other.BuildID, "vmlinux"))
	if err != nil {
		t.Fatal(err)
	}
	sum := md5.Sum(foreign) //nolint:gosec // see the import
	for name, text := range map[string][]byte{"vmlinux": foreign,
		"vmlinux.md5": []byte(hex.EncodeToString(sum[:]) + "\n")} {
		file := at(k.BuildID, name)
		if err := os.Remove(file); err != nil { // replaces the file, and does not write into it
			t.Fatal(err)
		}
		if err := os.WriteFile(file, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if res, err = build(); err != nil || res.Code != fault.Mismatch.ExitCode() ||
		!strings.Contains(string(res.Stderr), "not the kernel of this COS build") {
		t.Errorf("build with a foreign vmlinux = %d, %v; want %d\n%s", res.Code, err, fault.Mismatch.ExitCode(), res.Stderr)
	}
	if res, err = inspect(); err != nil || !strings.Contains(string(res.Stdout), "not the kernel of") {
		t.Errorf("inspect with a foreign vmlinux = %d, %v\n%s", res.Code, err, res.Stdout)
	}
}

// allBlobs returns the decoded payloads of all signed statements in an OCI layout.
func allBlobs(t *testing.T, layout string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(layout, "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var bundle struct {
			DSSEEnvelope struct {
				Payload []byte `json:"payload"`
			} `json:"dsseEnvelope"`
		}
		if len(text) < 1<<20 && json.Unmarshal(text, &bundle) == nil {
			all.Write(bundle.DSSEEnvelope.Payload)
		}
	}
	return all.String()
}
