package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/offline"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
)

// TestBundle copies drivers through bundle files from one registry to another, with the commands that an operator uses.
func TestBundle(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	farm := testkit.Registry(t, true) + "/prebake/driver"
	repo, err := registry.Open(farm, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	key := testkit.NewKey(t)
	driver := target.Driver{Version: "535.261.03", Flavour: target.Open}
	var samples []testkit.Sample
	for _, patch := range []string{"47", "50"} {
		s := testkit.NewSample(t, key, testkit.SampleKernel(patch), driver, "")
		s.Publish(t, repo)
		samples = append(samples, s)
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(at("farm.pub"), key.PEM(t), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(at("signed"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("signed/root.json"), []byte("root"), 0o600); err != nil {
		t.Fatal(err)
	}
	does := func(want int, args ...string) (stdout, stderr string) {
		t.Helper()
		code, out, errs := run(t, append([]string{"bundle"}, args...)...)
		if code != want {
			t.Errorf("bundle %s = %d\n%s%s\nwant %d", strings.Join(args, " "), code, out, errs, want)
		}
		for line := range strings.Lines(out) {
			if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 80 && !strings.Contains(line, dir) &&
				!strings.HasPrefix(out, "{") {
				t.Errorf("bundle %s prints %d columns: %q; want 80 at most", args[0], n, line)
			}
		}
		return out, errs
	}
	create := func(name string, more ...string) []string {
		return append([]string{"create", at(name), "--from", farm, "--public-key", at("farm.pub")}, more...)
	}

	out, _ := does(0, create("one.tar", "--kernel", "17800.0.47/lakitu", "--snapshot", at("signed"))...)
	for _, want := range []string{"535.261.03-open for 17800.0.47/lakitu", "snapshot", "keys", "holds"} {
		if !strings.Contains(out, want) {
			t.Errorf("bundle create prints\n%s\nwant %q in it", out, want)
		}
	}
	out, _ = does(0, create("two.tar", "--since", at("one.tar"), "--driver", driver.Version, "--output", "json")...)
	var report offline.Report
	if err := json.Unmarshal([]byte(out), &report); err != nil || report.LeftOutBytes == 0 || len(report.Artifacts) != 2 {
		t.Errorf("bundle create --since = %+v, %v; want two drivers, and bytes left out", report, err)
	}
	out, _ = does(0, create("two-again.tar", "--since", at("one.tar"))...)
	if !strings.Contains(out, "left out") || !strings.Contains(out, "delta of "+report.Base) {
		t.Errorf("bundle create --since prints\n%s\nwant the size of the left-out blobs, and the earlier bundle's index", out)
	}
	both := at("one.tar") + "+" + at("two.tar")
	if out, _ = does(0, "show", both); strings.Count(out, "driver ") != 2 || !strings.Contains(out, "verified") {
		t.Errorf("bundle show prints\n%s\nwant two drivers", out)
	}
	does(0, "extract", at("one.tar"), "--snapshot", at("snapshot"), "--keys", at("keys"))
	for file, want := range map[string]string{"snapshot/root.json": "root", "keys/keys.pem": string(key.PEM(t))} {
		if raw, err := os.ReadFile(at(file)); err != nil || string(raw) != want {
			t.Errorf("bundle extract wrote %q as %s, %v; want %q", raw, file, err, want)
		}
	}

	site := testkit.Registry(t, true) + "/site/driver"
	does(0, "push", both, "--to", site)
	to, err := registry.Open(site, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range samples {
		if d, err := to.Resolve(t.Context(), bundle.KernelTag(s.Kernel, driver)); err != nil ||
			d.Digest.String() != s.Digest {
			t.Errorf("after bundle push, the artifact of %s is %v, %v; want %s", s.Kernel, d.Digest, err, s.Digest)
		}
	}
	if _, err := to.Resolve(t.Context(), offline.TagSnapshot); !fault.Is(err, fault.NoArtifact) {
		t.Errorf("Resolve(snapshot) after bundle push = %v; want no artifact, because push copies only drivers", err)
	}

	for _, row := range []struct {
		code fault.Kind
		says string
		args []string
	}{
		{fault.Usage, "one argument", []string{"create"}},
		{fault.Usage, "--from", []string{"create", at("x.tar")}},
		{fault.Usage, "exists already", create("one.tar")},
		{fault.Usage, "hint:  see builder bundle create --help", create("x.tar", "--kernel", "17800.0.47")},
		{fault.Usage, "want a version", create("x.tar", "--driver", "R535")},
		{fault.NoArtifact, "17800.0.99/lakitu", create("x.tar", "--kernel", "17800.0.99/lakitu")},
		{fault.NotFound, "no such file", create("x.tar", "--since", at("none.tar"))},
		{fault.Usage, "oci-archive:EARLIER.tar+" + at("two.tar"), []string{"show", at("two.tar")}},
		{fault.Usage, "is a complete bundle", []string{"push", at("one.tar") + "+" + at("one.tar"), "--to", site}},
		{fault.Unverified, "is not a tar", []string{"show", at("farm.pub")}},
		{fault.Usage, "neither --snapshot nor --keys is given", []string{"extract", at("one.tar")}},
		{fault.NoArtifact, "snapshot", []string{"extract", both, "--snapshot", at("elsewhere")}},
	} {
		if _, errs := does(row.code.ExitCode(), row.args...); !strings.Contains(errs, row.says) {
			t.Errorf("bundle %s says\n%s\nwant %q", strings.Join(row.args, " "), errs, row.says)
		}
	}
	if left, err := filepath.Glob(at(".x.tar*")); err != nil || len(left) != 0 {
		t.Errorf("the failed commands left %v, %v; want no file", left, err)
	}
	if _, err := os.Stat(at("x.tar")); err == nil {
		t.Error("a failed command left x.tar")
	}
}
