package mirror

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/gotest"
)

// TestNext lets the builder build and load-test two driver branches, both flavours, for two kernel series. Some cells
// are built again with an empty cache, and must have the same digests. TestRealSameBytes checks that a plain build,
// without Prebake's caches, compiles the same modules. A driver that is too old for a kernel must fail with the
// compiler's message.
//
// It takes half an hour or more, so it runs only if PREBAKE_NEXT_CACHE is set to the cache folder of `mirror`. `make
// next` sets it.
func TestNext(t *testing.T) {
	cache := os.Getenv("PREBAKE_NEXT_CACHE")
	if cache == "" {
		t.Skip("PREBAKE_NEXT_CACHE is not set to the cache folder of `mirror --kernel-series 6.1,6.12 " +
			"--driver-branch R535,R550`; run make next")
	}
	dir := t.TempDir()
	builder := compilePrograms(t, target.AMD64)

	mirror := filepath.Join(dir, "mirror")
	var made Result
	builder(&made, "mirror", "--kernel-series", "6.1,6.12", "--kernels", "2", "--driver-branch", "R535,R550", "--out",
		mirror, "--cache", cache, "--output", "json")
	kernels := map[string]string{} // BUILD_ID of each series
	for _, b := range made.Builds {
		series := strings.Join(strings.SplitN(b.Release, ".", 3)[:2], ".")
		if kernels[series] == "" {
			kernels[series] = b.BuildID
		}
	}
	if kernels["6.1"] == "" || kernels["6.12"] == "" {
		t.Fatalf("mirror made %+v; want kernels of 6.1 and 6.12", made.Builds)
	}
	wish := filepath.Join(dir, "wish.yaml")
	// The newer kernel is an early warning, so its failures do not change the exit status.
	text := "version: 1\nboards: [lakitu]\nkernels:\n  - build: " + kernels["6.1"] + "\n  - build: " + kernels["6.12"] +
		"\n    earlyWarning: true\n" +
		"drivers:\n  - default\n  - branch: R550\nflavours: [proprietary, open]\n"
	if err := os.WriteFile(wish, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	key, buckets := filepath.Join(dir, "key"), []string{"--kernel-mirror", "file://" + mirror + "/cos", "--driver-mirror",
		"file://" + mirror + "/drivers"}
	builder(nil, "keygen", key)
	build := func(out any, cache string, more ...string) {
		args := append([]string{"build", "--key", key, "--cache", filepath.Join(dir, cache), "--to",
			"oci:" + filepath.Join(dir, "out-"+cache), "--output", "json"}, buckets...)
		builder(out, append(args, more...)...)
	}
	var report struct {
		Cells []struct {
			Cell struct {
				Kernel target.Kernel
				Driver target.Driver
			}
			State, Digest string
			Failure       *struct{ Class, Error string }
		}
	}
	build(&report, "all", "--wish", wish, "--load-test", "require")
	if len(report.Cells) != 8 {
		t.Fatalf("the wish list came to %d cells; want 8", len(report.Cells))
	}
	digests := map[string]string{}
	for _, c := range report.Cells {
		name := c.Cell.Kernel.BuildID + "/" + c.Cell.Driver.String()
		digests[name] = c.Digest
		switch {
		case c.State == "published":
			t.Logf("%s: %s", name, c.Digest)
		case c.Failure != nil && c.Failure.Class == "api-break" && strings.Contains(c.Failure.Error, "error:") &&
			c.Cell.Kernel.BuildID == kernels["6.12"]:
			t.Logf("%s: the driver is too old for the kernel: %s", name, c.Failure.Error)
		default:
			t.Errorf("%s: %s %+v", name, c.State, c.Failure)
		}
	}
	var cells []string
	for _, again := range []struct {
		series string
		branch string
	}{{"6.12", "R550"}, {"6.1", "R550"}, {"6.1", "R535"}} {
		for _, c := range report.Cells {
			d := c.Cell.Driver
			if c.State != "published" || c.Cell.Kernel.BuildID != kernels[again.series] ||
				target.Branch(d.Version) != again.branch || d.Flavour != target.Proprietary {
				continue
			}
			var one struct{ Digest string }
			build(&one, "alone-"+again.series+again.branch, "--build-id", c.Cell.Kernel.BuildID, "--driver", d.Version,
				"--flavour", string(d.Flavour), "--load-test", "off")
			if one.Digest != c.Digest {
				t.Errorf("%s %s from an empty cache has the digest %s; want %s", c.Cell.Kernel.BuildID, d, one.Digest, c.Digest)
			}
			cells = append(cells, c.Cell.Kernel.BuildID+"/"+d.Version)
		}
	}
	if len(cells) != 3 {
		t.Fatalf("%v were made again; want three cells", cells)
	}
	cmd := exec.CommandContext(t.Context(), "go", "test", "-v", "-count=1", "-timeout=90m",
		"-run=^(TestRealPlans|TestRealSameBytes)$", "github.com/prebake/prebake/builder/internal/conftest",
		"github.com/prebake/prebake/builder/internal/compile")
	cmd.Env = append(os.Environ(), "PREBAKE_MIRROR=file://"+mirror, "PREBAKE_CELLS="+strings.Join(cells, " "))
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err := gotest.Check(out, err); err != nil {
		t.Errorf("questions of all drivers, and same bytes: %v", err)
	}
}
