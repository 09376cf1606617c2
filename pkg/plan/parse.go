package plan

import (
	"fmt"
	"net/url"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/yamlfile"
)

const hintSchema = "correct the file as in docs/examples/wish.yaml; " +
	"to print a schema for editors, run: builder wish schema"

// Parse reads a wish list. name is the file's name in errors. One error of kind fault.Usage lists all mistakes, each
// with its line and column, what was found, and what is wanted.
func Parse(name string, data []byte) (*Wish, error) {
	p := &parser{Reader: yamlfile.Reader{Name: name}}
	w := &Wish{}
	if top, ok := p.Document(data, MaxFile, "version, kernels and drivers"); ok {
		w = p.wish(top)
	}
	if err := p.Err("read wish list", hintSchema); err != nil {
		return nil, err
	}
	return w, nil
}

type parser struct {
	yamlfile.Reader
	labels []labelAt
}

// labelAt is a label with its place in the file, and the driver that has it.
type labelAt struct {
	yamlfile.At
	label  string
	driver Driver
}

// readWords reads a list of words. A repeated word is a mistake.
func readWords[T ~string](p *parser, a yamlfile.At, what string, parse func(yamlfile.At) (T, bool)) []T {
	var all []T
	p.List(a, what, func(e yamlfile.At) {
		v, ok := parse(e)
		switch {
		case !ok:
		case slices.Contains(all, v):
			p.Say(e, "found %s twice; want it once", yamlfile.Found(e.Node))
		default:
			all = append(all, v)
		}
	})
	return all
}

func (p *parser) wish(a yamlfile.At) *Wish {
	w := &Wish{Flavours: []target.Flavour{target.Proprietary, target.Open}}
	seen := p.Mapping(a, "a mapping with version, kernels and drivers", map[string]func(yamlfile.At){
		"version": func(a yamlfile.At) {
			if w.Version = p.Number(a, 1, 1<<30, "1"); w.Version > FormatVersion {
				p.Say(a, "found version %d of the format; want %d; other versions need another builder", w.Version, FormatVersion)
			}
		},
		"imageMap":      func(a yamlfile.At) { w.ImageMap = p.url(a) },
		"boards":        func(a yamlfile.At) { w.Boards = readWords(p, a, "boards, such as lakitu", p.board) },
		"architectures": func(a yamlfile.At) { w.Architectures = readWords(p, a, "amd64 and arm64", p.arch) },
		"kernels": func(a yamlfile.At) {
			p.List(a, "kernels", func(e yamlfile.At) { w.Kernels = append(w.Kernels, p.kernel(e)) })
		},
		"drivers":  func(a yamlfile.At) { p.List(a, "drivers", func(e yamlfile.At) { p.addDriver(w, e) }) },
		"flavours": func(a yamlfile.At) { w.Flavours = readWords(p, a, "proprietary and open", p.flavour) },
		"exclude": func(a yamlfile.At) {
			p.List(a, "rules", func(e yamlfile.At) { w.Exclude = append(w.Exclude, p.exclude(e)) })
		},
	})
	if seen == nil {
		return nil
	}
	for _, must := range []string{"version", "kernels", "drivers"} {
		if _, ok := seen[must]; !ok {
			p.Say(a, "found no field %s; want this field", must)
		}
	}
	if both, ok := seen["architectures"]; ok && len(w.Boards) > 0 {
		p.Say(both, "found architectures and boards; want only one of these fields")
	}
	if list, ok := seen["kernels"]; ok && w.ImageMap == "" && seen["imageMap"].Node == nil {
		for i, k := range w.Kernels {
			if k.Released {
				p.Say(yamlfile.At{Node: list.Node.Content[i], Path: fmt.Sprintf("kernels[%d]", i)},
					"found released without an image map; want imageMap at the top of the file")
			}
		}
	}
	p.checkLabels(w)
	return w
}

// checkLabels checks the rules about labels that depend on the whole file.
func (p *parser) checkLabels(w *Wish) {
	seen := map[string]bool{}
	for _, l := range p.labels {
		flavours := l.driver.Flavours
		if len(flavours) == 0 {
			flavours = w.Flavours
		}
		wish, _ := target.ParseLabel(l.label) // the label was checked before
		branch, is := wish.BranchName()
		of := target.Branch(string(l.driver.Wish))
		if _, exact := l.driver.Wish.Exact(); !exact {
			of = string(l.driver.Wish)
		}
		switch {
		case seen[l.label]:
			p.Say(l.At, "found label %s for a second driver; want it once", l.label)
		case is && branch != of:
			p.Say(l.At, "found label %s for driver %s; want the label of the driver's own branch", l.label, l.driver.Wish)
		case !slices.Contains(flavours, target.Open):
			p.Say(l.At, "found a label for a driver without the open flavour; want open among the driver's flavours, since "+
				"COS's installer takes no other flavour from a bucket")
		}
		seen[l.label] = true
	}
}

func (p *parser) url(a yamlfile.At) string {
	const what = "a URL such as https://www.gstatic.com/gke-image-maps/gke-to-cos.json"
	text, ok := p.Word(a, what)
	if !ok {
		return ""
	}
	u, err := url.Parse(text)
	if err != nil || !slices.Contains([]string{"https", "http", "file", "gs"}, u.Scheme) ||
		strings.Trim(u.Path, "/") == "" {
		p.Want(a, "%s", what)
		return ""
	}
	return text
}

func (p *parser) board(a yamlfile.At) (string, bool) {
	text, ok := p.Word(a, "a board such as lakitu or lakitu-arm64")
	if !ok {
		return "", false
	}
	if _, err := target.ParseKernel("1.0.0", text); err != nil {
		p.Want(a, "a board such as lakitu or lakitu-arm64")
		return "", false
	}
	return text, true
}

func (p *parser) arch(a yamlfile.At) (target.Arch, bool) {
	text, ok := p.Word(a, "amd64 or arm64")
	if arch := target.Arch(text); ok && (arch == target.AMD64 || arch == target.ARM64) {
		return arch, true
	}
	if ok {
		p.Want(a, "amd64 or arm64")
	}
	return "", false
}

func (p *parser) flavour(a yamlfile.At) (target.Flavour, bool) {
	text, ok := p.Word(a, "proprietary or open")
	if !ok {
		return "", false
	}
	f, err := target.ParseFlavour(text)
	if err != nil {
		p.Want(a, "proprietary or open")
	}
	return f, err == nil
}

func (p *parser) build(a yamlfile.At) string {
	const what = "a BUILD_ID such as 17800.66.78"
	text, ok := p.Word(a, what)
	if !ok {
		return ""
	}
	if _, err := target.ParseKernel(text, "lakitu"); err != nil {
		p.Want(a, "%s", what)
		return ""
	}
	return text
}

func (p *parser) kernel(a yamlfile.At) Kernel {
	var k Kernel
	seen := p.Mapping(a, "a kernel: {build: 17800.66.78}, {milestone: 109, latest: 3} or {latest: 2}",
		map[string]func(yamlfile.At){
			"build":        func(a yamlfile.At) { k.Build = p.build(a) },
			"milestone":    func(a yamlfile.At) { k.Milestone = p.Number(a, minMilestone, maxMilestone, "109") },
			"latest":       func(a yamlfile.At) { k.Latest = p.Number(a, 1, maxLatest, "3") },
			"board":        func(a yamlfile.At) { k.Board, _ = p.board(a) },
			"released":     func(a yamlfile.At) { k.Released = p.Bool(a) },
			"earlyWarning": func(a yamlfile.At) { k.EarlyWarning = p.Bool(a) },
		})
	has := func(name string) bool { return seen[name].Node != nil }
	switch {
	case seen == nil:
	case has("build"):
		for _, other := range []string{"milestone", "latest", "released"} {
			if has(other) {
				p.Say(seen[other], "found %s beside build; want either an exact COS build or the latest COS builds", other)
			}
		}
	case !has("latest") && has("milestone"):
		p.Say(seen["milestone"], "found milestone without latest; want the number of newest COS builds, such as latest: 3")
	case !has("latest"):
		p.Say(a, "found neither build nor latest; want {build: 17800.66.78}, {milestone: 109, latest: 3} or {latest: 2}")
	}
	return k
}

func (p *parser) addDriver(w *Wish, a yamlfile.At) {
	d, ok := p.driver(a)
	switch {
	case !ok:
	case slices.ContainsFunc(w.Drivers, func(have Driver) bool { return have.Wish == d.Wish }):
		p.Say(a, "found driver %s twice; want it once", d.Wish)
	default:
		w.Drivers = append(w.Drivers, d)
	}
}

func (p *parser) driver(a yamlfile.At) (Driver, bool) {
	const what = "default, latest, a branch such as R535, or a version such as 535.261.03"
	var d Driver
	if a.Node.Kind == yaml.ScalarNode {
		text, ok := p.Word(a, what)
		if !ok {
			return d, false
		}
		wish, err := target.ParseGPUWish(text)
		if err != nil {
			p.Want(a, "%s", what)
		}
		d.Wish = wish
		return d, err == nil
	}
	before := p.Mistakes()
	seen := p.Mapping(a, "a driver: "+what, map[string]func(yamlfile.At){
		"version": func(a yamlfile.At) {
			text, ok := p.Word(a, "a version such as 535.261.03")
			if ok && !target.ValidVersion(text) {
				p.Want(a, "a version such as 535.261.03")
			}
			d.Wish = target.Wish(text)
		},
		"branch": func(a yamlfile.At) {
			text, ok := p.Word(a, "a branch such as R535")
			if _, is := target.Wish(text).BranchName(); ok && !is {
				p.Want(a, "a branch such as R535")
			}
			d.Wish = target.Wish(text)
		},
		"flavours": func(a yamlfile.At) { d.Flavours = readWords(p, a, "proprietary and open", p.flavour) },
		"labels":   func(a yamlfile.At) { d.Labels = readWords(p, a, "labels, such as DEFAULT", p.label) },
	})
	_, version := seen["version"]
	_, branch := seen["branch"]
	switch {
	case seen == nil:
	case version == branch:
		p.Say(a, "found %s; want either version or branch",
			map[bool]string{true: "version and branch", false: "neither version nor branch"}[version])
	}
	if p.Mistakes() > before {
		return d, false
	}
	for i, label := range d.Labels {
		e := yamlfile.At{Node: seen["labels"].Node.Content[i], Path: fmt.Sprintf("%s.labels[%d]", a.Path, i)}
		p.labels = append(p.labels, labelAt{e, label, d})
	}
	return d, true
}

func (p *parser) label(a yamlfile.At) (string, bool) {
	const what = "DEFAULT, LATEST or a branch such as R535"
	text, ok := p.Word(a, what)
	if !ok {
		return "", false
	}
	_, err := target.ParseLabel(text)
	if err != nil {
		p.Want(a, "%s", what)
	}
	return text, err == nil
}

func (p *parser) exclude(a yamlfile.At) Exclude {
	x := Exclude{line: a.Node.Line}
	seen := p.Mapping(a, "a rule such as {build: 17800.66.78, driver: R535, flavour: open}", map[string]func(yamlfile.At){
		"build":     func(a yamlfile.At) { x.Build = p.build(a) },
		"milestone": func(a yamlfile.At) { x.Milestone = p.Number(a, minMilestone, maxMilestone, "109") },
		"board":     func(a yamlfile.At) { x.Board, _ = p.board(a) },
		"driver": func(a yamlfile.At) {
			text, ok := p.Word(a, "a version or a branch such as R535")
			_, branch := target.Wish(text).BranchName()
			if ok && !branch && !target.ValidVersion(text) {
				p.Want(a, "a version or a branch such as R535")
			}
			x.Driver = text
		},
		"flavour": func(a yamlfile.At) { x.Flavour, _ = p.flavour(a) },
		"reason":  func(a yamlfile.At) { x.Reason, _ = p.Word(a, "a text") },
	})
	if _, reason := seen["reason"]; seen != nil && (len(seen) == 0 || len(seen) == 1 && reason) {
		p.Say(a, "found a rule that excludes everything; want at least one of board, build, driver, flavour or milestone")
	}
	return x
}
