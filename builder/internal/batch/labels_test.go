package batch_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/batch"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
)

// fakeCOS is a fake of Google's COS release bucket. It has, for each BUILD_ID, the driver version that Google labels
// DEFAULT. The version "down" means that the bucket does not answer.
type fakeCOS map[string]string

func (s fakeCOS) Drivers(_ context.Context, k target.Kernel) (cosbucket.DriverList, error) {
	switch version := s[k.BuildID]; version {
	case "":
		return cosbucket.DriverList{}, fault.New(fault.InputMissing, "no list", "")
	case "down":
		return cosbucket.DriverList{}, fault.New(fault.Transient, "bucket down", "")
	default:
		return cosbucket.DriverList{Default: version}, nil
	}
}

// TestLabel checks the labels of published tarballs, such as LATEST, which are files named gpu_latest_version. Label
// must write the labels of a wish list for every COS build in every bucket, and remove labels that the wish list no
// longer has.
func TestLabel(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := sign.GenerateKey(filepath.Join(dir, "key")); err != nil {
		t.Fatal(err)
	}
	signer, err := sign.LoadSigner(t.Context(), filepath.Join(dir, "key"))
	if err != nil {
		t.Fatal(err)
	}
	p := &batch.Destinations{Signer: signer}
	if p.Verifier, err = signer.Verifier(); err != nil {
		t.Fatal(err)
	}
	modules := t.TempDir()
	if err := os.WriteFile(filepath.Join(modules, "nvidia.ko"), []byte("module"), 0o644); err != nil {
		t.Fatal(err)
	}
	kernel := func(id string) target.Kernel { return target.Kernel{BuildID: id, Board: "lakitu", Arch: target.AMD64} }
	for _, name := range []string{"a", "b"} {
		b, err := tarball.Open(t.Context(), "file://"+filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		p.Buckets = append(p.Buckets, b)
		for _, id := range []string{"17800.0.1", "17800.0.2", "17800.0.3"} {
			if _, err := tarball.Publish(t.Context(), b,
				tarball.Release{Kernel: kernel(id), Driver: driver, Modules: modules, Signer: signer,
					Artifact: "sha256:" + strings.Repeat("ab", 32)}); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Cleanup(func() { _ = p.Close() })
	cell := func(id string, labels ...string) plan.Cell {
		return plan.Cell{Kernel: kernel(id), Driver: driver, Labels: labels}
	}
	objects := func() []string {
		var all []string
		for _, pattern := range []string{"a/*/lakitu/gpu_*_version", "b/*/lakitu/gpu_*_version"} {
			names, err := filepath.Glob(filepath.Join(dir, pattern))
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range names {
				all = append(all, strings.TrimPrefix(name, dir+"/"))
			}
		}
		slices.Sort(all)
		return all
	}
	cos := fakeCOS{"17800.0.2": driver.Version, "17800.0.3": "down", "17800.0.4": driver.Version}
	const unsigned = "a list that somebody changed"
	for _, row := range []struct {
		name  string
		cells []plan.Cell
		want  []string
		notes int
		fails bool
	}{
		{"declared, said, not known, not published",
			[]plan.Cell{cell("17800.0.1", "LATEST"), cell("17800.0.2", "R535"), cell("17800.0.3", "LATEST"),
				cell("17800.0.4", "LATEST"), {Problem: &plan.Problem{}}},
			[]string{"1/lakitu/gpu_latest", "2/lakitu/gpu_R535", "2/lakitu/gpu_default"}, 2, true},
		{"no longer, and a build that is no longer named", []plan.Cell{cell("17800.0.2")},
			[]string{"1/lakitu/gpu_latest", "2/lakitu/gpu_default"}, 0, false},
		{unsigned, []plan.Cell{cell("17800.0.1")}, []string{"2/lakitu/gpu_default"}, 1, false},
	} {
		if row.name == unsigned {
			list := filepath.Join(dir, "a/17800.0.1/lakitu/gpu_driver_versions.textproto")
			text, err := os.ReadFile(list)
			if err == nil {
				err = os.WriteFile(list, append(text, "# changed by somebody\n"...), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		var notes []string
		err := p.Label(t.Context(), &plan.Plan{Cells: row.cells}, "https://example.com/b", cos,
			func(s string) { notes = append(notes, s) })
		if fault.Is(err, fault.Transient) != row.fails || (err != nil) != row.fails {
			t.Errorf("%s: Label = %v; want failure %v, transient", row.name, err, row.fails)
		}
		if len(notes) != row.notes {
			t.Errorf("%s: notes = %q; want %d", row.name, notes, row.notes)
		}
		var want []string
		for _, bucket := range []string{"a", "b"} {
			for _, name := range row.want {
				want = append(want, bucket+"/17800.0."+name+"_version")
			}
		}
		if diff := cmp.Diff(want, objects()); diff != "" {
			t.Errorf("%s: labels (-want +got):\n%s", row.name, diff)
		}
	}
	if err := (&batch.Destinations{}).Label(t.Context(), &plan.Plan{Cells: []plan.Cell{cell("17800.0.3")}}, "b", cos,
		nil); err != nil {
		t.Errorf("Label without buckets = %v; want nothing asked", err)
	}
}
