package tarball_test

import (
	"errors"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/encoding/prototext"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/cosbucket/gpuversions"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

const (
	v261, v309, v580 = "535.261.03", "535.309.01", "580.1.1"
	here             = "17800.0.47/lakitu/"
)

type labels = map[string]string

// publishAll publishes drivers with the given versions and the open flavour.
func publishAll(t testing.TB, b *tarball.Bucket, s *sign.Signer, versions ...string) {
	t.Helper()
	for _, v := range versions {
		if _, err := tarball.Publish(t.Context(), b,
			newRelease(t, s, target.Driver{Version: v, Flavour: target.Open}, "")); err != nil {
			t.Fatal(err)
		}
	}
}

// labelling returns a complete labelling by the builder https://example.com/a: the declared labels, and those of COS.
func labelling(s *sign.Signer, declared, said labels) tarball.Labelling {
	return tarball.Labelling{Kernel: kernel, Builder: "https://example.com/a", Declared: declared, FromCOS: said,
		Complete: true, Signer: s}
}

// withoutStates returns the objects without the signatures of the lists and of the index. A signature is for one state
// of an object, and signatures of former states stay in the bucket.
func withoutStates(all map[string]string) map[string]string {
	all = maps.Clone(all)
	maps.DeleteFunc(all, func(name, _ string) bool {
		return strings.Contains(name, ".sha256-") && strings.HasSuffix(name, ".sigstore.json")
	})
	return all
}

// rowsOf returns one line for each label in gpu_driver_versions, with row, label and version, and one for each label's
// own object. The text and the binary format must agree.
func rowsOf(t testing.TB, all map[string]string) []string {
	t.Helper()
	var forms [2][]string
	for i, form := range []tarball.Form{tarball.Text, tarball.Binary} {
		var list gpuversions.GPUDriverVersionInfoList
		if err := form.Unmarshal([]byte(all[here+"gpu_driver_versions."+form.Name]), &list); err != nil {
			t.Fatal(err)
		}
		for _, info := range list.GetGpuDriverVersionInfo() {
			for _, v := range info.GetSupportedDriverVersions() {
				if v.GetLabel() != "" {
					forms[i] = append(forms[i], info.GetGpuDevice().GetGpuType()+" "+v.GetLabel()+" "+v.GetVersion())
				}
			}
		}
		slices.Sort(forms[i])
	}
	if diff := cmp.Diff(forms[0], forms[1]); diff != "" {
		t.Errorf("labels of the text and the binary differ (-text +binary):\n%s", diff)
	}
	for name, text := range all {
		if strings.HasPrefix(name, here+"gpu_") && strings.HasSuffix(name, "_version") {
			forms[0] = append(forms[0], path.Base(name)+" "+strings.TrimSuffix(text, "\n"))
		}
	}
	slices.Sort(forms[0])
	return forms[0]
}

// TestLabels checks that SetLabels gives a bucket the declared labels and COS's labels, and that it removes all traces
// of other labels.
func TestLabels(t *testing.T) {
	eachStore(t, func(t *testing.T, dest string) {
		s, _ := newSigner(t)
		v := verifier(t, s)
		b := openBucket(t, dest)
		if got, err := tarball.SetLabels(t.Context(), b, labelling(s, labels{"DEFAULT": v261}, nil)); err != nil ||
			!got.Existed || !slices.Equal(got.Absent, []string{"DEFAULT"}) {
			t.Fatalf("SetLabels in an empty bucket = %+v, %v; want the label absent", got, err)
		}
		publishAll(t, b, s, v261, v309, v580)
		if _, err := tarball.Publish(t.Context(), b,
			newRelease(t, s, target.Driver{Version: "570.1.1", Flavour: target.Proprietary}, "")); err != nil {
			t.Fatal(err)
		}
		bare := content(t, dest)
		said := labels{"DEFAULT": v261, "LATEST": "999.1", "R535": v309, "R570": "570.1.1"}
		for _, row := range []struct {
			name     string
			declared labels
			said     labels
			want     []string
			absent   []string
		}{
			{"as COS says", nil, said,
				[]string{"NO_GPU DEFAULT " + v261, "NO_GPU R535 " + v309, "OTHERS DEFAULT " + v261, "OTHERS R535 " + v309,
					"gpu_R535_version " + v309, "gpu_default_version " + v261}, nil},
			{"declared", labels{"DEFAULT": v580, "LATEST": v580}, said, []string{
				"NO_GPU DEFAULT " + v580, "NO_GPU LATEST " + v580, "NO_GPU R535 " + v309, "OTHERS DEFAULT " + v580,
				"OTHERS LATEST " + v580, "OTHERS R535 " + v309,
				"gpu_R535_version " + v309, "gpu_default_version " + v580, "gpu_latest_version " + v580,
			}, nil},
			{"declared, not published", labels{"DEFAULT": "590.1.1", "LATEST": ""}, said, []string{
				"NO_GPU DEFAULT " + v580, "NO_GPU LATEST " + v580, "NO_GPU R535 " + v309, "OTHERS DEFAULT " + v580,
				"OTHERS LATEST " + v580, "OTHERS R535 " + v309,
				"gpu_R535_version " + v309, "gpu_default_version " + v580, "gpu_latest_version " + v580,
			}, []string{"DEFAULT", "LATEST"}},
			{"declared no more", nil, labels{"DEFAULT": v261, "R535": "580.1.1"},
				[]string{"NO_GPU DEFAULT " + v261, "OTHERS DEFAULT " + v261, "gpu_default_version " + v261}, nil},
			{"nothing", nil, nil, nil, nil},
		} {
			for _, existed := range []bool{false, true} {
				l := labelling(s, row.declared, row.said)
				got, err := tarball.SetLabels(t.Context(), b, l)
				if existed = existed || row.name == "declared, not published"; err != nil || got.Existed != existed {
					t.Fatalf("%s: SetLabels = %+v, %v; want existed %v", row.name, got, err, existed)
				}
				if diff := cmp.Diff(row.absent, got.Absent); diff != "" {
					t.Errorf("%s: absent (-want +got):\n%s", row.name, diff)
				}
				all := content(t, dest)
				if diff := cmp.Diff(row.want, rowsOf(t, all)); diff != "" {
					t.Fatalf("%s: labels (-want +got):\n%s", row.name, diff)
				}
				check(t, all, v)
				checkSigned(t, all, s)
			}
			if row.name == "declared" {
				b, err := cosbucket.Open(t.Context(), dest)
				if err != nil {
					t.Fatal(err)
				}
				list, err := b.Drivers(t.Context(), kernel)
				if err = errors.Join(err, b.Close()); err != nil || list.Default != v580 || list.Latest != v580 ||
					list.Branches["R535"] != v309 {
					t.Errorf("Drivers = %+v, %v; want the labels", list, err)
				}
			}
		}
		if diff := cmp.Diff(withoutStates(bare), withoutStates(content(t, dest))); diff != "" {
			t.Errorf("after all labels were removed (-before any label +now):\n%s", diff)
		}
	})
}

// checkSigned checks that the lists and the labels' own objects have a signature of their present state.
func checkSigned(t testing.TB, all map[string]string, s *sign.Signer) {
	t.Helper()
	v := verifier(t, s)
	for name, text := range all {
		if !strings.HasPrefix(name, here+"gpu_") || strings.Contains(name, ".sha256-") {
			continue
		}
		digest := digestOf([]byte(text))
		bundle := all[name+".sha256-"+strings.TrimPrefix(digest, "sha256:")+".sigstore.json"]
		if _, err := tarball.Verify(v, []byte(bundle), digest,
			tarball.ObjectFacts{Object: name, BuildID: kernel.BuildID, Board: kernel.Board}); err != nil {
			t.Errorf("signature of %s: %v", name, err)
		}
	}
}

// TestLabelsOfOneBuild checks labellings that are not complete, as single builds make them. Each moves only its own
// labels. A label of COS must not replace one that an earlier build declared.
func TestLabelsOfOneBuild(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	dest := "file://" + filepath.Join(t.TempDir(), "bucket")
	b := openBucket(t, dest)
	publishAll(t, b, s, v261, v309)
	give := func(whole bool, declared, said labels, want string) {
		t.Helper()
		l := labelling(s, declared, said)
		l.Complete = whole
		if _, err := tarball.SetLabels(t.Context(), b, l); err != nil {
			t.Fatal(err)
		}
		if got := rowsOf(t, content(t, dest)); !slices.Contains(got, "OTHERS DEFAULT "+want) ||
			!slices.Contains(got, "gpu_default_version "+want) {
			t.Errorf("labels = %q; want DEFAULT to be %s", got, want)
		}
	}
	give(false, nil, labels{"DEFAULT": v261}, v261)
	give(false, nil, labels{"DEFAULT": v309}, v309)
	give(false, labels{"DEFAULT": v261}, nil, v261)
	give(false, labels{"R535": v309}, labels{"DEFAULT": v309}, v261) // an earlier build declared DEFAULT
	if got := rowsOf(t, content(t, dest)); !slices.Contains(got, "OTHERS R535 "+v309) {
		t.Errorf("labels = %q; want R535 beside DEFAULT", got)
	}
	give(true, nil, labels{"DEFAULT": v309}, v309)
}

// TestLabelsOfOthers checks that SetLabels keeps labels that are in a copy of COS's own list, and those of another
// builder.
func TestLabelsOfOthers(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	dest := "file://" + filepath.Join(t.TempDir(), "bucket")
	dir := strings.TrimPrefix(dest, "file://")
	writeCOSLists(t, dir)
	b := openBucket(t, dest)
	publishAll(t, b, s, v261, v309)
	cos := rowsOf(t, content(t, dest))
	refused := func(l tarball.Labelling, why string) {
		t.Helper()
		before := content(t, dest)
		if got, err := tarball.SetLabels(t.Context(), b, l); !fault.Is(err, fault.PublishRefused) || fault.Hint(err) == "" ||
			!strings.Contains(err.Error(), why) {
			t.Errorf("SetLabels = %+v, %v; want publish refused, a hint, and %q", got, err, why)
		}
		if diff := cmp.Diff(before, content(t, dest)); diff != "" {
			t.Errorf("a refused label changed (-before +after):\n%s", diff)
		}
	}
	give := func(l tarball.Labelling, want ...string) {
		t.Helper()
		if _, err := tarball.SetLabels(t.Context(), b, l); err != nil {
			t.Fatal(err)
		}
		want = append(want, cos...)
		slices.Sort(want)
		if diff := cmp.Diff(want, rowsOf(t, content(t, dest))); diff != "" {
			t.Errorf("labels (-want +got):\n%s", diff)
		}
	}
	refused(labelling(s, labels{"DEFAULT": v261}, nil), "535.1.1 has this label already, for OTHERS, set by somebody else")
	// SetLabels sets a label of COS, unless the label is already on another version and somebody else put it there.
	give(labelling(s, nil, labels{"DEFAULT": v261}), "NO_GPU DEFAULT "+v261, "gpu_default_version "+v261)
	give(labelling(s, nil, nil))

	other := func(declared labels) tarball.Labelling {
		l := labelling(s, declared, nil)
		l.Builder = "https://example.com/b"
		return l
	}
	both := []string{"NO_GPU R535 " + v261, "OTHERS R535 " + v261, "gpu_R535_version " + v261}
	give(labelling(s, labels{"R535": v261}, nil), both...)
	refused(other(labels{"R535": v309}), "set by builder https://example.com/a")
	give(other(labels{"R535": v261}), both...)
	give(other(nil), both...)
	give(labelling(s, nil, nil))
	write(t, filepath.Join(dir, here, "gpu_R535_version"), "535.1.1\n")
	cos = append(cos, "gpu_R535_version 535.1.1")
	refused(other(labels{"R535": v309}), "535.1.1 has this label already, in the label's own object")
}

// TestLabelsNeedTarballs checks that a version gets a label only if its tarball is complete and signed.
func TestLabelsNeedTarballs(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	object := tarball.TarballName(kernel, open)
	for name, spoil := range map[string]func(file string) error{
		"no tarball":   os.Remove,
		"cut short":    func(file string) error { return os.Truncate(file, 10) },
		"no signature": func(file string) error { return os.Remove(file + ".sigstore.json") },
		"signed for another build": func(file string) error {
			return os.Rename(filepath.Join(filepath.Dir(file), "nvidia-drivers-"+v309+".tgz.sigstore.json"),
				file+".sigstore.json")
		},
	} {
		dir := filepath.Join(t.TempDir(), "bucket")
		b := openBucket(t, "file://"+dir)
		publishAll(t, b, s, v261, v309)
		if err := spoil(filepath.Join(dir, object)); err != nil {
			t.Fatal(err)
		}
		before := content(t, "file://"+dir)
		if got, err := tarball.SetLabels(t.Context(), b, labelling(s, labels{"DEFAULT": v261}, nil)); !fault.Is(err,
			fault.PublishRefused) || fault.Hint(err) == "" {
			t.Errorf("%s: SetLabels = %+v, %v; want publish refused with a hint", name, got, err)
		}
		if diff := cmp.Diff(before, content(t, "file://"+dir)); diff != "" {
			t.Errorf("%s: a refused label changed (-before +after):\n%s", name, diff)
		}
	}
}

// TestLabelsCutOffAnywhere interrupts a change of labels at every call to the bucket. After each interruption, the
// index must have every label that the lists have.
func TestLabelsCutOffAnywhere(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	v := verifier(t, s)
	for n := 0; ; n++ {
		m := tarball.NewMemory()
		b := m.Bucket()
		publishAll(t, b, s, v261, v309)
		bare := withoutStates(m.Content())
		if _, err := tarball.SetLabels(t.Context(), b,
			labelling(s, labels{"DEFAULT": v261, "LATEST": v261}, nil)); err != nil {
			t.Fatal(err)
		}
		cut := cutAfter(n)
		_, err := tarball.SetLabels(t.Context(), tarball.Breaking(b, cut, cut),
			labelling(s, labels{"DEFAULT": v309}, labels{"R535": v309}))
		check(t, m.Content(), v)
		if err != nil && !errors.Is(err, errCut) {
			t.Fatalf("n=%d: SetLabels = %v; want %v", n, err, errCut)
		}
		if _, err := tarball.SetLabels(t.Context(), b, labelling(s, nil, nil)); err != nil {
			t.Fatalf("n=%d: SetLabels of nothing = %v", n, err)
		}
		if diff := cmp.Diff(bare, withoutStates(m.Content())); diff != "" {
			t.Fatalf("n=%d: after all labels were removed (-before any label +now):\n%s", n, diff)
		}
		if err == nil {
			if n < 20 {
				t.Errorf("SetLabels made only %d calls; want 20 or more", n)
			}
			return
		}
	}
}

// TestLabelsSideBySide checks that no entry and no label is lost if several builders publish and set labels at the same
// time.
func TestLabelsSideBySide(t *testing.T) {
	eachStore(t, func(t *testing.T, dest string) {
		s, _ := newSigner(t)
		versions := []string{"510.1.1", "520.1.1", "530.1.1", "540.1.1"}
		var want []string
		var g errgroup.Group
		refused := make([]error, len(versions))
		for i, version := range versions {
			d := target.Driver{Version: version, Flavour: target.Open}
			branch := d.Branch()
			want = append(want, "NO_GPU "+branch+" "+version, "OTHERS "+branch+" "+version, "gpu_"+branch+"_version "+version)
			r, b := newRelease(t, s, d, ""), openBucket(t, dest)
			l := labelling(s, labels{branch: version}, nil)
			l.Builder, l.Complete = "https://example.com/"+branch, false
			g.Go(func() error {
				if _, err := tarball.Publish(t.Context(), b, r); err != nil {
					return err
				}
				if _, err := tarball.SetLabels(t.Context(), b, l); err != nil {
					return err
				}
				l.Declared = labels{"DEFAULT": version}
				_, refused[i] = tarball.SetLabels(t.Context(), b, l)
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		// Each builder also sets DEFAULT to its own version. Only one of them may succeed.
		won := 0
		for i, err := range refused {
			switch {
			case err == nil:
				won++
				want = append(want, "NO_GPU DEFAULT "+versions[i], "OTHERS DEFAULT "+versions[i],
					"gpu_default_version "+versions[i])
			case !fault.Is(err, fault.PublishRefused):
				t.Errorf("SetLabels(DEFAULT to %s) = %v; want nil or publish refused", versions[i], err)
			}
		}
		slices.Sort(want)
		if diff := cmp.Diff(want, rowsOf(t, content(t, dest))); diff != "" || won != 1 {
			t.Errorf("%d builders set DEFAULT; want 1. Labels (-want +got):\n%s", won, diff)
		}
		checkSigned(t, content(t, dest), s)
	})
}

func TestLabellingRefuses(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	b := openBucket(t, "file://"+t.TempDir())
	for name, spoil := range map[string]func(l *tarball.Labelling){
		"no build":          func(l *tarball.Labelling) { l.Kernel.BuildID = "" },
		"no key":            func(l *tarball.Labelling) { l.Signer = nil },
		"no builder":        func(l *tarball.Labelling) { l.Builder = "" },
		"no label":          func(l *tarball.Labelling) { l.Declared = labels{"BEST": v261} },
		"of another branch": func(l *tarball.Labelling) { l.Declared = labels{"R580": v261} },
	} {
		l := labelling(s, labels{"DEFAULT": v261}, nil)
		spoil(&l)
		if got, err := tarball.SetLabels(t.Context(), b, l); !fault.Is(err, fault.Usage) {
			t.Errorf("%s: SetLabels = %+v, %v; want kind usage", name, got, err)
		}
	}
}

// FuzzRelabel sets labels in an arbitrary list and removes them again. The entries must then be the same as before.
func FuzzRelabel(f *testing.F) {
	f.Add([]byte(cosText))
	f.Add([]byte(`gpu_driver_version_info { gpu_device { gpu_type: "OTHERS" } supported_driver_versions { version: "535.261.03" } supported_driver_versions { label: "R535" version: "535.261.03" } }`))
	f.Fuzz(func(t *testing.T, have []byte) {
		before, err := tarball.Text.Add(have, v261, none)
		if err != nil {
			return
		}
		var list gpuversions.GPUDriverVersionInfoList
		if err := prototext.Unmarshal(before, &list); err != nil {
			t.Fatal(err)
		}
		binary, err := tarball.Binary.Marshal(&list)
		if err != nil {
			t.Fatal(err)
		}
		give := []tarball.Label{{Label: "DEFAULT", GPUType: "OTHERS", Version: v261},
			{Label: "R535", GPUType: "OTHERS", Version: v261}}
		for _, l := range give {
			if strings.Contains(string(before), `"`+l.Label+`"`) {
				return // the list has this label already, so Relabel would remove it
			}
		}
		for _, row := range []struct {
			form tarball.Form
			have []byte
		}{{tarball.Text, before}, {tarball.Binary, binary}} {
			given, err := row.form.Relabel(row.have, nil, give)
			if err != nil {
				t.Fatalf("%s: Relabel(%q) = %v", row.form.Name, row.have, err)
			}
			var with gpuversions.GPUDriverVersionInfoList
			if err := row.form.Unmarshal(given, &with); err != nil {
				t.Fatal(err)
			}
			if got := with.String(); !strings.Contains(got, "DEFAULT") || !strings.Contains(got, "R535") {
				t.Errorf("%s: Relabel = %s; want both labels", row.form.Name, got)
			}
			taken, err := row.form.Relabel(given, give, nil)
			if err != nil {
				t.Fatal(err)
			}
			var got gpuversions.GPUDriverVersionInfoList
			if err := row.form.Unmarshal(taken, &got); err != nil {
				t.Fatal(err)
			}
			checkKept(t, &list, &got)
			checkKept(t, &got, &list)
		}
	})
}
