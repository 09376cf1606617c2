package plan_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
)

const imageMap = `{"creation_time": "2026-11-01", "entries": [
	{"gke_version": "1.33.1-gke.1", "image": "cos-109-17800-0-47"},
	{"gke_version": "1.33.1-gke.2", "image": "cos-109-17800-0-47"},
	{"gke_version": "1.33.1-gke.1", "image": "cos-arm64-109-17800-0-50"},
	{"gke_version": "1.37.1-gke.1", "image": "cos-dev-140-20300-0-1"},
	{"gke_version": "1.37.1-gke.1", "image": "ubuntu-gke-2404-1-33"}
]}`

// world is a fake bucket: a list of COS builds, and the list of drivers for each of them.
type world struct {
	builds  []string
	err     error
	drivers map[string]cosbucket.DriverList
	trouble map[string]error
}

func (w world) BuildIDs(context.Context) ([]string, error) {
	var ids []string
	for _, b := range w.builds {
		id, _, _ := strings.Cut(b, "/")
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b string) int { return target.CompareVersions(b, a) })
	return slices.Compact(ids), w.err
}

func (w world) BuildsOf(_ context.Context, ids []string) ([]target.Kernel, error) {
	var all []target.Kernel
	for _, id := range ids {
		for _, b := range w.builds {
			have, board, _ := strings.Cut(b, "/")
			if have != id {
				continue
			}
			k, err := target.ParseKernel(id, board)
			if err != nil {
				return nil, err
			}
			all = append(all, k)
		}
	}
	return all, nil
}

func (w world) Drivers(_ context.Context, k target.Kernel) (cosbucket.DriverList, error) {
	if err := w.trouble[k.BuildID]; err != nil {
		return cosbucket.DriverList{}, err
	}
	list, ok := w.drivers[k.BuildID]
	if !ok {
		return list, fault.New(fault.InputMissing, "no list", "")
	}
	return list, nil
}

func list(def, latest string, branches ...string) cosbucket.DriverList {
	l := cosbucket.DriverList{Default: def, Latest: latest, Branches: map[string]string{}}
	for _, v := range branches {
		l.Branches[target.Branch(v)] = v
	}
	return l
}

func real109() world {
	return world{
		builds: []string{"17800.0.9/lakitu", "17800.0.47/lakitu", "17800.0.50/lakitu", "17800.0.50/lakitu-arm64",
			"18244.0.2/lakitu", "20300.0.1/lakitu", "20301.0.0/lakitu"},
		drivers: map[string]cosbucket.DriverList{
			"17800.0.9":  list("470.1.1", "", "470.1.1"),
			"17800.0.47": list("535.1.1", "550.1.1", "535.1.1", "550.1.1"),
			"17800.0.50": list("535.2.2", "550.1.1", "535.2.2", "550.1.1"),
			"18244.0.2":  list("550.1.1", "550.1.1", "550.1.1"),
		},
		trouble: map[string]error{"20300.0.1": fault.New(fault.Transient, "bucket down", "")},
	}
}

// planText prints a plan, with one line for each cell.
func planText(p *plan.Plan) string {
	var lines []string
	for _, c := range p.Cells {
		s := fmt.Sprintf("%s %s", c.Kernel, c.Driver)
		if c.Kernel.Milestone != 0 {
			s = fmt.Sprintf("M%d %s", c.Kernel.Milestone, s)
		}
		if c.EarlyWarning {
			s += " early"
		}
		if !c.Listed && c.Problem == nil {
			s += " by name"
		}
		s += " <" + strings.Join(c.Asked, "; ") + ">"
		if len(c.Labels) > 0 {
			s += " " + strings.Join(c.Labels, ",")
		}
		if c.Problem != nil {
			s += " " + fault.Of(c.Problem.Err).String()
			if c.Problem.Unavailable {
				s += " unavailable"
			}
		}
		lines = append(lines, s)
	}
	for kernel, labels := range p.Labels() {
		for label, version := range labels {
			lines = append(lines, fmt.Sprintf("%s calls %q %s", kernel, version, label))
		}
	}
	slices.Sort(lines[len(p.Cells):])
	return strings.Join(append(lines, p.Notes...), "\n")
}

func TestExpand(t *testing.T) {
	t.Parallel()
	noList := fault.New(fault.Unsupported, "a web server cannot list", "")
	images, err := plan.ParseImageMap([]byte(imageMap))
	if err != nil {
		t.Fatal(err)
	}
	with := func(w world, change func(*world)) world { change(&w); return w }
	rows := []struct {
		name, wish string
		world      world
		images     *plan.ImageMap
		want       []string
	}{
		{"an exact cell asks the bucket nothing", "kernels: [{build: 1.2.3}]\ndrivers: [535.9]\nflavours: [open]",
			world{err: noList}, nil,
			[]string{"1.2.3/lakitu 535.9-open <535.9>"}},
		{"the newest of a milestone, both flavours", "kernels: [{milestone: 109, latest: 2}]\ndrivers: [default]", real109(),
			nil, []string{
				"M109 17800.0.50/lakitu 535.2.2-proprietary <default>", "M109 17800.0.50/lakitu 535.2.2-open <default>",
				"M109 17800.0.47/lakitu 535.1.1-proprietary <default>", "M109 17800.0.47/lakitu 535.1.1-open <default>"}},
		{"wishes that mean one version are one cell",
			"kernels: [{build: 17800.0.50}]\ndrivers: [default, R535, 535.2.2, latest]\nflavours: [open]", real109(), nil,
			[]string{
				"M109 17800.0.50/lakitu 535.2.2-open <default; R535; 535.2.2>", "M109 17800.0.50/lakitu 550.1.1-open <latest>"}},
		{"a flavour asked for by name",
			"kernels: [{build: 17800.0.50}]\ndrivers: [default, {version: 535.2.2, flavours: [open]}]", real109(), nil, []string{
				"M109 17800.0.50/lakitu 535.2.2-proprietary <default>",
				"M109 17800.0.50/lakitu 535.2.2-open by name <default; 535.2.2>"}},
		{"architectures are boards",
			"architectures: [arm64, amd64]\nkernels: [{milestone: 109, latest: 1}]\ndrivers: [550.1.1]\nflavours: [open]",
			real109(), nil, []string{
				"M109 17800.0.50/lakitu-arm64 550.1.1-open <550.1.1>", "M109 17800.0.50/lakitu 550.1.1-open <550.1.1>"}},
		{"board of one entry", "kernels: [{milestone: 109, latest: 1, board: lakitu-arm64}]\ndrivers: " +
			"[550.1.1]\nflavours: [open]", real109(), nil, []string{
			"M109 17800.0.50/lakitu-arm64 550.1.1-open <550.1.1>"}},
		{"early warnings come last; a kernel that another entry asks for too is no early warning",
			"kernels: [{latest: 2, earlyWarning: true}, {milestone: 113, latest: 1, earlyWarning: true}, {build: " +
				"18244.0.2}]\ndrivers: [550.1.1]\nflavours: [open]", real109(), nil, []string{
				"M113 18244.0.2/lakitu 550.1.1-open <550.1.1>", "20301.0.0/lakitu 550.1.1-open early <550.1.1>",
				"20300.0.1/lakitu 550.1.1-open early <550.1.1>"}},
		{"trouble with one kernel holds up no other", "kernels: [{latest: 3}]\ndrivers: [default]\nflavours: [open]",
			real109(), nil, []string{
				"20301.0.0/lakitu - <default> input-missing unavailable", "20300.0.1/lakitu - <default> transient",
				"M113 18244.0.2/lakitu 550.1.1-open <default>"}},
		{"a branch that some builds lack is unavailable there",
			"kernels: [{milestone: 113, latest: 1}, {milestone: 109, latest: 1}]\ndrivers: [R535]\nflavours: [open]", real109(),
			nil, []string{
				"M113 18244.0.2/lakitu - <R535> unsupported unavailable", "M109 17800.0.50/lakitu 535.2.2-open <R535>"}},
		{"a branch that all builds lack is a failure",
			"kernels: [{milestone: 113, latest: 1}]\ndrivers: [R999, default]\nflavours: [open]", real109(), nil, []string{
				"M113 18244.0.2/lakitu - <R999> unsupported", "M113 18244.0.2/lakitu 550.1.1-open <default>"}},
		{"a milestone without builds",
			"kernels: [{milestone: 125, latest: 1}, {build: 17800.0.50}]\ndrivers: [default]\nflavours: [open]", real109(), nil,
			[]string{
				"/lakitu - <milestone 125, latest 1> input-missing", "M109 17800.0.50/lakitu 535.2.2-open <default>"}},
		{"a bucket that cannot list, no map",
			"kernels: [{latest: 1}, {build: 17800.0.50}]\ndrivers: [default]\nflavours: [open]",
			with(real109(), func(w *world) { w.err = noList }), nil, []string{
				"/lakitu - <latest 1> unsupported", "M109 17800.0.50/lakitu 535.2.2-open <default>"}},
		{"a bucket that cannot list, with a map",
			"kernels: [{milestone: 109, latest: 5}]\ndrivers: [default]\nflavours: [open]",
			with(real109(), func(w *world) { w.err = noList }), images, []string{
				"M109 17800.0.47/lakitu 535.1.1-open <default>"}},
		{"the map knows newer milestones", "kernels: [{milestone: 140, latest: 5}]\ndrivers: [550.1.1]\nflavours: [open]",
			real109(), images, []string{
				"M140 20300.0.1/lakitu 550.1.1-open <550.1.1>"}},
		{"only what was released",
			"imageMap: https://x/y\nkernels: [{milestone: 109, latest: 5, released: true}]\ndrivers: " +
				"[550.1.1]\nflavours: [open]", real109(), images, []string{
				"M109 17800.0.47/lakitu 550.1.1-open <550.1.1>"}},
		{"labels of the open flavour, of a version by two names, and of one that nobody knows",
			"kernels: [{milestone: 109, latest: 2}, {build: 18244.0.2}]\ndrivers: [{branch: R535, labels: [DEFAULT, R535]}, " +
				"{version: 535.1.1, flavours: [open], labels: [LATEST]}]\nexclude: [{build: 18244.0.2, driver: 535.1.1}]",
			real109(), nil, []string{
				"M109 17800.0.50/lakitu 535.2.2-proprietary <R535>", "M109 17800.0.50/lakitu 535.2.2-open <R535> DEFAULT,R535",
				"M109 17800.0.50/lakitu 535.1.1-open by name <535.1.1> LATEST",
				"M109 17800.0.47/lakitu 535.1.1-proprietary <R535>",
				"M109 17800.0.47/lakitu 535.1.1-open by name <R535; 535.1.1> DEFAULT,R535,LATEST",
				"M113 18244.0.2/lakitu - <R535> DEFAULT,R535 unsupported unavailable",
				`17800.0.47/lakitu calls "535.1.1" DEFAULT`, `17800.0.47/lakitu calls "535.1.1" LATEST`,
				`17800.0.47/lakitu calls "535.1.1" R535`,
				`17800.0.50/lakitu calls "535.1.1" LATEST`, `17800.0.50/lakitu calls "535.2.2" DEFAULT`,
				`17800.0.50/lakitu calls "535.2.2" R535`,
				`18244.0.2/lakitu calls "" DEFAULT`, `18244.0.2/lakitu calls "" R535`}},
		{"rules", "kernels: [{milestone: 109, latest: 3}]\ndrivers: [default, R550]\nflavours: [proprietary, " +
			"open]\nexclude:\n- {driver: R470}\n- {driver: R550, build: 17800.0.9}\n- {build: 17800.0.47, flavour: open}\n- " +
			"{driver: 535.2.2}\n- {milestone: 113}", real109(), nil, []string{
			"M109 17800.0.50/lakitu 550.1.1-proprietary <R550>", "M109 17800.0.50/lakitu 550.1.1-open <R550>",
			"M109 17800.0.47/lakitu 535.1.1-proprietary <default>", "M109 17800.0.47/lakitu 550.1.1-proprietary <R550>",
			"exclude[4] (line 10) excludes nothing"}},
	}
	for _, row := range rows {
		w, err := plan.Parse("w", []byte("version: 1\n"+row.wish+"\n"))
		if err != nil {
			t.Errorf("%s: %v", row.name, err)
			continue
		}
		p, err := plan.Expand(t.Context(), w, row.world, row.images)
		if err != nil {
			t.Errorf("%s: Expand: %v", row.name, err)
			continue
		}
		if diff := cmp.Diff(row.want, strings.Split(planText(p), "\n")); diff != "" {
			t.Errorf("%s: cells (-want +got):\n%s", row.name, diff)
		}
	}
}

func TestExpandRefuses(t *testing.T) {
	t.Parallel()
	parse := func(text string) *plan.Wish {
		w, err := plan.Parse("w", []byte("version: 1\n"+text))
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	all := parse("kernels: [{build: 1.2.3}]\ndrivers: [535.9]\nexclude: [{build: 1.2.3}]\n")
	if p, err := plan.Expand(t.Context(), all, world{}, nil); !fault.Is(err, fault.Usage) {
		t.Errorf("Expand(everything excluded) = %v, %v; want a usage fault", p, err)
	}
	var many world
	for i := range 1000 {
		many.builds = append(many.builds, fmt.Sprintf("17800.1.%d/lakitu", i))
	}
	drivers := make([]string, 11)
	for i := range drivers {
		drivers[i] = fmt.Sprintf("535.%d", i)
	}
	huge := parse("kernels: [{latest: 1000}]\ndrivers: [" + strings.Join(drivers, ", ") + "]\n")
	if p, err := plan.Expand(t.Context(), huge, many, nil); !fault.Is(err, fault.Usage) {
		t.Errorf("Expand(22000 cells) = %d cells, %v; want a usage fault", len(p.Cells), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := plan.Expand(ctx, parse("kernels: [{build: 1.2.3}]\ndrivers: [535.9]\n"), world{}, nil); !fault.Is(err,
		fault.Cancelled) {
		t.Errorf("Expand(cancelled) = %v; want cancelled", err)
	}
}

func TestParseImageMap(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"no JSON":   "<html>",
		"no image":  `{"entries": []}`,
		"only GKE":  `{"entries": [{"image": "gke-1357-gke1027000-cos-125-19216-532-25-c-pre"}]}`,
		"too large": strings.Repeat(" ", plan.MaxImageMap+1),
	} {
		if m, err := plan.ParseImageMap([]byte(text)); !fault.Is(err, fault.Unsupported) || fault.Hint(err) == "" {
			t.Errorf("%s: ParseImageMap = %v, %v; want unsupported with a hint", name, m, err)
		}
	}
}
