package plan_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
)

// TestExample checks that the example in docs is a valid wish list, and that it means what its comments say.
func TestExample(t *testing.T) {
	t.Parallel()
	file := filepath.Join("..", "..", "docs", "examples", "wish.yaml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	got, err := plan.Parse(file, text)
	if err != nil {
		t.Fatal(err)
	}
	both := []target.Flavour{target.Proprietary, target.Open}
	want := &plan.Wish{
		Version: 1, ImageMap: "https://www.gstatic.com/gke-image-maps/gke-to-cos.json",
		Boards: []string{"lakitu", "lakitu-arm64"},
		Kernels: []plan.Kernel{
			{Build: "17800.66.78", Board: "lakitu"},
			{Milestone: 125, Latest: 3, Released: true},
			{Latest: 1, EarlyWarning: true},
		},
		Drivers: []plan.Driver{{Wish: target.Default}, {Wish: target.Latest}, {Wish: "default@NVIDIA_H100_80GB"},
			{Wish: "R580", Labels: []string{"LATEST"}},
			{Wish: "535.261.03", Flavours: both[:1]}},
		Flavours: both,
		Exclude: []plan.Exclude{
			{Driver: "R535", Milestone: 125, Reason: "no longer supported there"},
			{Board: "lakitu-arm64", Flavour: target.Proprietary},
		},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(plan.Exclude{})); diff != "" {
		t.Errorf("Parse(%s) (-want +got):\n%s", file, diff)
	}
}

// TestParse reads the shortest wish list, and versions that YAML takes for numbers.
func TestParse(t *testing.T) {
	t.Parallel()
	got, err := plan.Parse("w.yaml",
		[]byte("version: 1\nkernels: [{latest: 2}]\ndrivers: [535.10, {version: 550.20, labels: [DEFAULT, R550]}, R470]\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := &plan.Wish{
		Version: 1, Kernels: []plan.Kernel{{Latest: 2}},
		Drivers:  []plan.Driver{{Wish: "535.10"}, {Wish: "550.20", Labels: []string{"DEFAULT", "R550"}}, {Wish: "R470"}},
		Flavours: []target.Flavour{target.Proprietary, target.Open},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Parse (-want +got):\n%s", diff)
	}
}

// TestMistakes checks that one error lists all mistakes, each with its line and column.
func TestMistakes(t *testing.T) {
	t.Parallel()
	const head, tail = "version: 1\nkernels: [{latest: 1}]\n", "drivers: [default]\n"
	rows := []struct {
		name, text string
		want       string // the lines of the error after the first line
	}{
		{"empty", "", "w:1:1: found an empty file; want version, kernels and drivers"},
		{"only a comment", "# nothing\n", "w:1:1: found an empty file; want version, kernels and drivers"},
		{"no mapping", "- 1\n", "w:1:1: found a list; want a mapping with version, kernels and drivers"},
		{"not YAML", "version: 1\nkernels: [\n", "w:2:1: the file is not YAML: did not find expected node content"},
		{"too much", strings.Repeat("# \n", 400_000), "w:1:1: the file has more than 1048576 bytes"},
		{"two documents", head + tail + "---\nversion: 1\n", "w:4:1: found a second document; want one in a file"},
		{"nothing in it", "version: 1\n", "w:1:1: found no field kernels; want this field\n" +
			"w:1:1: found no field drivers; want this field"},
		{"newer format", "version: 2\nkernels: [{latest: 1}]\n" + tail,
			"w:1:10: version: found version 2 of the format; want 1; other versions need another builder"},
		{"unknown field", head + tail + "driver: x\n",
			`w:4:1: found field "driver"; want architectures, boards, drivers, exclude, flavours, imageMap, kernels or version`},
		{"twice", head + tail + "drivers: [latest]\n", `w:4:1: found field "drivers" twice; want it once`},
		{"alias", head + "flavours: &f [open]\n" + tail, "w:3:11: flavours: found an anchor or alias; want the value itself"},
		{"alias in a list", head + "drivers:\n- &d default\n- *d\n",
			"w:4:3: drivers[0]: found an anchor or alias; want the value itself\nw:5:3: drivers[1]: found an anchor or alias; " +
				"want the value itself"},
		{"merge key", "<<: {version: 1}\n" + head + tail,
			`w:1:1: found field "<<"; want architectures, boards, drivers, exclude, flavours, imageMap, kernels or version`},
		{"empty list", "version: 1\nkernels: []\n" + tail, "w:2:10: kernels: found a list; want a list of kernels"},
		{"null list", "version: 1\nkernels:\n" + tail, "w:2:9: kernels: found nothing; want a list of kernels"},
		{"a word as kernel", "version: 1\nkernels: [17800.0.50]\n" + tail,
			`w:2:11: kernels[0]: found "17800.0.50"; want a kernel: {build: 17800.66.78}, {milestone: 109, latest: 3} or {latest: 2}`},
		{"bad build", "version: 1\nkernels: [{build: 17800.50}]\n" + tail,
			`w:2:19: kernels[0].build: found "17800.50"; want a BUILD_ID such as 17800.66.78`},
		{"build and latest", "version: 1\nkernels: [{build: 17800.0.50, latest: 1}]\n" + tail,
			"w:2:39: kernels[0].latest: found latest beside build; want either an exact COS build or the latest COS builds"},
		{"milestone alone", "version: 1\nkernels: [{milestone: 109}]\n" + tail,
			"w:2:23: kernels[0].milestone: found milestone without latest; want the number of newest COS builds, " +
				"such as latest: 3"},
		{"nothing asked", "version: 1\nkernels: [{board: lakitu}]\n" + tail,
			"w:2:11: kernels[0]: found neither build nor latest; want {build: 17800.66.78}, {milestone: 109, latest: 3} or " +
				"{latest: 2}"},
		{"a number in words", "version: 1\nkernels: [{latest: three}]\n" + tail,
			`w:2:20: kernels[0].latest: found "three"; want a number from 1 to 1000, such as 3`},
		{"too many", "version: 1\nkernels: [{latest: 1001}]\n" + tail,
			`w:2:20: kernels[0].latest: found "1001"; want a number from 1 to 1000, such as 3`},
		{"no flag", "version: 1\nkernels: [{latest: 1, earlyWarning: sometimes}]\n" + tail,
			`w:2:37: kernels[0].earlyWarning: found "sometimes"; want true or false`},
		{"released without a map", "version: 1\nkernels: [{latest: 1, released: true}]\n" + tail,
			"w:2:11: kernels[0]: found released without an image map; want imageMap at the top of the file"},
		{"bad URL", "imageMap: gke-to-cos.json\n" + head + tail,
			`w:1:11: imageMap: found "gke-to-cos.json"; want a URL such as https://www.gstatic.com/gke-image-maps/gke-to-cos.json`},
		{"bad board", "boards: [../x]\n" + head + tail,
			`w:1:10: boards[0]: found "../x"; want a board such as lakitu or lakitu-arm64`},
		{"board twice", "boards: [lakitu, lakitu]\n" + head + tail, `w:1:18: boards[1]: found "lakitu" twice; want it once`},
		{"boards and architectures", "boards: [lakitu]\narchitectures: [amd64]\n" + head + tail,
			"w:2:16: architectures: found architectures and boards; want only one of these fields"},
		{"bad architecture", "architectures: [x86_64]\n" + head + tail,
			`w:1:17: architectures[0]: found "x86_64"; want amd64 or arm64`},
		{"bad driver", head + "drivers: [newest]\n",
			`w:3:11: drivers[0]: found "newest"; want default, latest, a branch such as R535, or a version such as 535.261.03`},
		{"driver twice", head + "drivers: [R535, {branch: R535}]\n",
			"w:3:17: drivers[1]: found driver R535 twice; want it once"},
		{"version and branch", head + "drivers: [{version: 535.1, branch: R535}]\n",
			"w:3:11: drivers[0]: found version and branch; want either version or branch"},
		{"neither", head + "drivers: [{flavours: [open]}]\n",
			"w:3:11: drivers[0]: found neither version nor branch; want either version or branch"},
		{"bad branch", head + "drivers: [{branch: 535}]\n",
			`w:3:20: drivers[0].branch: found "535"; want a branch such as R535`},
		{"bad flavour", head + tail + "flavours: [closed]\n",
			`w:4:12: flavours[0]: found "closed"; want proprietary or open`},
		{"a rule for all", head + tail + "exclude: [{reason: tired}]\n",
			"w:4:11: exclude[0]: found a rule that excludes everything; want at least one of board, build, driver, flavour " +
				"or milestone"},
		{"a rule with a wish", head + tail + "exclude: [{driver: default}]\n",
			`w:4:20: exclude[0].driver: found "default"; want a version or a branch such as R535`},
		{"bad label", head + "drivers: [{branch: R535, labels: [default]}]\n",
			`w:3:35: drivers[0].labels[0]: found "default"; want DEFAULT, LATEST or a branch such as R535`},
		{"label twice", head + "drivers: [{branch: R535, labels: [LATEST, LATEST]}]\n",
			`w:3:43: drivers[0].labels[1]: found "LATEST" twice; want it once`},
		{"label for two", head + "drivers: [{branch: R535, labels: [LATEST]}, {version: 580.1, labels: [LATEST]}]\n",
			"w:3:71: drivers[1].labels[0]: found label LATEST for a second driver; want it once"},
		{"label of another branch", head + "drivers: [{branch: R535, labels: [R580]}, {version: 580.1, labels: [R535]}]\n",
			strings.Join([]string{
				"w:3:35: drivers[0].labels[0]: found label R580 for driver R535; want the label of the driver's own branch",
				"w:3:69: drivers[1].labels[0]: found label R535 for driver 580.1; want the label of the driver's own branch",
			}, "\n")},
		{"label without the open flavour",
			"flavours: [proprietary]\n" + head +
				"drivers: [{version: 535.1, labels: [R535]}, {version: 580.1, flavours: [open], labels: [R580]}]\n",
			"w:4:37: drivers[0].labels[0]: found a label for a driver without the open flavour; want open among the " +
				"driver's flavours, since COS's installer takes no other flavour from a bucket"},
		{"several", "version: x\nkernels:\n- {latset: 1}\ndrivers: [R]\n", strings.Join([]string{
			`w:1:10: version: found "x"; want a number from 1 to 1073741824, such as 1`,
			"w:3:3: kernels[0]: found neither build nor latest; want {build: 17800.66.78}, {milestone: 109, latest: 3} or " +
				"{latest: 2}",
			`w:3:4: kernels[0]: found field "latset"; want board, build, earlyWarning, latest, milestone or released`,
			`w:4:11: drivers[0]: found "R"; want default, latest, a branch such as R535, or a version such as 535.261.03`,
		}, "\n")},
	}
	for _, row := range rows {
		_, err := plan.Parse("w", []byte(row.text))
		if !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
			t.Errorf("%s: Parse = %v, hint %q; want a usage fault with a hint", row.name, err, fault.Hint(err))
			continue
		}
		_, got, _ := strings.Cut(err.Error(), "\n")
		if diff := cmp.Diff(row.want, got); diff != "" {
			t.Errorf("%s: mistakes (-want +got):\n%s", row.name, diff)
		}
	}
}

func FuzzParse(f *testing.F) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "examples", "wish.yaml"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte("version: 1\nkernels: [{latest: 2}]\ndrivers: [default]\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		w, err := plan.Parse("w", text)
		if err != nil {
			if !fault.Is(err, fault.Usage) {
				t.Errorf("Parse = %v; want a usage fault", err)
			}
			return
		}
		if w.Version != plan.FormatVersion || len(w.Kernels) == 0 || len(w.Drivers) == 0 || len(w.Flavours) == 0 {
			t.Errorf("Parse let %+v through", w)
		}
		for _, k := range w.Kernels {
			if (k.Build == "") == (k.Latest == 0) {
				t.Errorf("Parse let kernel %+v through", k)
			}
		}
	})
}

func FuzzParseImageMap(f *testing.F) {
	f.Add([]byte(imageMap))
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := plan.ParseImageMap(text)
		if (m == nil) == (err == nil) {
			t.Errorf("ParseImageMap = %v, %v", m, err)
		}
	})
}
