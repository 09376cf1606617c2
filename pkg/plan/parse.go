package plan

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

const hintSchema = "see docs/examples/wish.yaml; builder wish schema prints what an editor needs to check the file"

// Parse reads a wish list; name is what the file is called in errors. The error
// tells all mistakes at once, each with its line and column, what was found and
// what is wanted.
func Parse(name string, data []byte) (*Wish, error) {
	p := &parser{name: name}
	w := p.file(data)
	if len(p.mistakes) == 0 {
		return w, nil
	}
	slices.SortStableFunc(p.mistakes, func(a, b mistake) int {
		if a.line != b.line {
			return a.line - b.line
		}
		return a.column - b.column
	})
	text := &strings.Builder{}
	if len(p.mistakes) == 1 {
		fmt.Fprintf(text, "read wish list: 1 mistake")
	} else {
		fmt.Fprintf(text, "read wish list: %d mistakes", len(p.mistakes))
	}
	for i, m := range p.mistakes {
		if i == maxMistakes {
			fmt.Fprintf(text, "\nand %d more", len(p.mistakes)-i)
			break
		}
		fmt.Fprintf(text, "\n%s:%d:%d: %s", p.name, m.line, m.column, m.text)
	}
	return nil, fault.New(fault.Usage, text.String(), hintSchema)
}

type mistake struct {
	line, column int
	text         string
}

// parser walks the nodes itself instead of decoding into the types: the
// library's own errors name Go types, and it stops at some.
type parser struct {
	name     string
	mistakes []mistake
	labels   []labelAt
}

// labelAt is a label and the driver that it is for.
type labelAt struct {
	at
	label  string
	driver Driver
}

// at is a node and the way to it, such as kernels[1].latest.
type at struct {
	node *yaml.Node
	path string
}

func (p *parser) say(a at, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if a.path != "" {
		text = a.path + ": " + text
	}
	p.mistakes = append(p.mistakes, mistake{max(a.node.Line, 1), max(a.node.Column, 1), text})
}

// want is the usual mistake: this was found, that is wanted.
func (p *parser) want(a at, format string, args ...any) {
	p.say(a, "found %s; want %s", found(a.node), fmt.Sprintf(format, args...))
}

func found(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.Kind == yaml.AliasNode:
		return "an alias"
	case n.Tag == "!!null":
		return "nothing"
	case len(n.Value) > 60:
		return strconv.Quote(n.Value[:60]) + "…"
	}
	return strconv.Quote(n.Value)
}

var syntaxLine = regexp.MustCompile(`^(?:yaml: )?line ([0-9]{1,9}): `)

func (p *parser) file(data []byte) *Wish {
	top := at{node: &yaml.Node{}}
	if len(data) > MaxFile {
		p.say(top, "more than %d bytes", MaxFile)
		return nil
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, more yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		p.say(top, "found an empty file; want version, kernels and drivers")
		return nil
	case err != nil:
		text := err.Error()
		if m := syntaxLine.FindStringSubmatch(text); m != nil {
			text = text[len(m[0]):]
			top.node.Line, _ = strconv.Atoi(m[1]) // at most nine digits
		}
		p.say(top, "not YAML: %s", strings.TrimPrefix(text, "yaml: "))
		return nil
	}
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		p.say(at{node: &more}, "found a second document; want one in a file")
	}
	if len(doc.Content) != 1 {
		p.say(top, "found an empty file; want version, kernels and drivers")
		return nil
	}
	return p.wish(at{node: doc.Content[0]})
}

// mapping calls the function of each field. A field without one, a field that
// comes twice and an alias are mistakes. It returns the fields that were there.
func (p *parser) mapping(a at, what string, fields map[string]func(at)) map[string]at {
	if a.node.Kind != yaml.MappingNode {
		p.want(a, "%s", what)
		return nil
	}
	seen := map[string]at{}
	for i := 0; i+1 < len(a.node.Content); i += 2 {
		key, value := a.node.Content[i], a.node.Content[i+1]
		field := at{value, strings.TrimPrefix(a.path+"."+key.Value, ".")}
		do, ok := fields[key.Value]
		switch _, twice := seen[key.Value]; {
		case key.Kind != yaml.ScalarNode || !ok:
			p.say(at{key, a.path}, "found field %s; want %s", found(key), oneOf(fields))
			continue
		case twice:
			p.say(at{key, a.path}, "found field %q twice; want it once", key.Value)
			continue
		}
		seen[key.Value] = field
		if value.Kind == yaml.AliasNode || value.Anchor != "" {
			p.say(field, "found an anchor or alias; want the value itself")
			continue
		}
		do(field)
	}
	return seen
}

func oneOf(fields map[string]func(at)) string {
	var names []string
	for name := range fields {
		names = append(names, name)
	}
	slices.Sort(names)
	if len(names) == 1 {
		return names[0]
	}
	return strings.Join(names[:len(names)-1], ", ") + " or " + names[len(names)-1]
}

// list calls item for each element of a list that has to have some.
func (p *parser) list(a at, what string, item func(at)) {
	if a.node.Kind != yaml.SequenceNode || len(a.node.Content) == 0 {
		p.want(a, "a list of %s", what)
		return
	}
	for i, n := range a.node.Content {
		e := at{n, fmt.Sprintf("%s[%d]", a.path, i)}
		if n.Kind == yaml.AliasNode || n.Anchor != "" {
			p.say(e, "found an anchor or alias; want the value itself")
			continue
		}
		item(e)
	}
}

// word reads a scalar as its text; numbers in YAML's eyes are text to us, so
// that a version 535.10 stays what it is.
func (p *parser) word(a at, what string) (string, bool) {
	if a.node.Kind != yaml.ScalarNode || a.node.Tag == "!!null" || a.node.Value == "" {
		p.want(a, "%s", what)
		return "", false
	}
	return a.node.Value, true
}

func (p *parser) number(a at, least, most int, example string) int {
	what := fmt.Sprintf("a number from %d to %d, such as %s", least, most, example)
	text, ok := p.word(a, what)
	if !ok {
		return 0
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > most || a.node.Tag != "!!int" {
		p.want(a, "%s", what)
		return 0
	}
	return n
}

func (p *parser) flag(a at) bool {
	if a.node.Kind != yaml.ScalarNode || a.node.Tag != "!!bool" {
		p.want(a, "true or false")
		return false
	}
	return strings.EqualFold(a.node.Value, "true")
}

// words reads a list of words without repetition.
func words[T ~string](p *parser, a at, what string, parse func(at) (T, bool)) []T {
	var all []T
	p.list(a, what, func(e at) {
		v, ok := parse(e)
		switch {
		case !ok:
		case slices.Contains(all, v):
			p.say(e, "found %s twice; want it once", found(e.node))
		default:
			all = append(all, v)
		}
	})
	return all
}

func (p *parser) wish(a at) *Wish {
	w := &Wish{Flavours: []target.Flavour{target.Proprietary, target.Open}}
	seen := p.mapping(a, "a mapping with version, kernels and drivers", map[string]func(at){
		"version": func(a at) {
			if w.Version = p.number(a, 1, 1<<30, "1"); w.Version > FormatVersion {
				p.say(a, "found version %d of the format; want %d, or a newer builder", w.Version, FormatVersion)
			}
		},
		"imageMap":      func(a at) { w.ImageMap = p.url(a) },
		"boards":        func(a at) { w.Boards = words(p, a, "boards, such as lakitu", p.board) },
		"architectures": func(a at) { w.Architectures = words(p, a, "amd64 and arm64", p.arch) },
		"kernels":       func(a at) { p.list(a, "kernels", func(e at) { w.Kernels = append(w.Kernels, p.kernel(e)) }) },
		"drivers":       func(a at) { p.list(a, "drivers", func(e at) { p.addDriver(w, e) }) },
		"flavours":      func(a at) { w.Flavours = words(p, a, "proprietary and open", p.flavour) },
		"exclude":       func(a at) { p.list(a, "rules", func(e at) { w.Exclude = append(w.Exclude, p.exclude(e)) }) },
	})
	if seen == nil {
		return nil
	}
	for _, must := range []string{"version", "kernels", "drivers"} {
		if _, ok := seen[must]; !ok {
			p.say(a, "found no %s; want it", must)
		}
	}
	if both, ok := seen["architectures"]; ok && len(w.Boards) > 0 {
		p.say(both, "found boards too; want one of the two")
	}
	if list, ok := seen["kernels"]; ok && w.ImageMap == "" && seen["imageMap"].node == nil {
		for i, k := range w.Kernels {
			if k.Released {
				p.say(at{list.node.Content[i], fmt.Sprintf("kernels[%d]", i)}, "found released without an image map; want imageMap at the top of the file")
			}
		}
	}
	p.checkLabels(w)
	return w
}

// checkLabels looks at what only the whole file tells of labels.
func (p *parser) checkLabels(w *Wish) {
	seen := map[string]bool{}
	for _, l := range p.labels {
		flavours := l.driver.Flavours
		if len(flavours) == 0 {
			flavours = w.Flavours
		}
		wish, _ := target.ParseLabel(l.label) // which was done before
		branch, is := wish.BranchName()
		of := target.Branch(string(l.driver.Wish))
		if _, exact := l.driver.Wish.Exact(); !exact {
			of = string(l.driver.Wish)
		}
		switch {
		case seen[l.label]:
			p.say(l.at, "found label %s for a second driver; want it once", l.label)
		case is && branch != of:
			p.say(l.at, "found label %s for driver %s; want it for a driver of that branch", l.label, l.driver.Wish)
		case !slices.Contains(flavours, target.Open):
			p.say(l.at, "found a label for a driver without the open flavour; want open among its flavours, since COS's installer takes no other from a bucket")
		}
		seen[l.label] = true
	}
}

func (p *parser) url(a at) string {
	const what = "a URL such as https://www.gstatic.com/gke-image-maps/gke-to-cos.json"
	text, ok := p.word(a, what)
	if !ok {
		return ""
	}
	u, err := url.Parse(text)
	if err != nil || !slices.Contains([]string{"https", "http", "file", "gs"}, u.Scheme) || strings.Trim(u.Path, "/") == "" {
		p.want(a, "%s", what)
		return ""
	}
	return text
}

func (p *parser) board(a at) (string, bool) {
	text, ok := p.word(a, "a board such as lakitu or lakitu-arm64")
	if !ok {
		return "", false
	}
	if _, err := target.ParseKernel("1.0.0", text); err != nil {
		p.want(a, "a board such as lakitu or lakitu-arm64")
		return "", false
	}
	return text, true
}

func (p *parser) arch(a at) (target.Arch, bool) {
	text, ok := p.word(a, "amd64 or arm64")
	if arch := target.Arch(text); ok && (arch == target.AMD64 || arch == target.ARM64) {
		return arch, true
	}
	if ok {
		p.want(a, "amd64 or arm64")
	}
	return "", false
}

func (p *parser) flavour(a at) (target.Flavour, bool) {
	text, ok := p.word(a, "proprietary or open")
	if !ok {
		return "", false
	}
	f, err := target.ParseFlavour(text)
	if err != nil {
		p.want(a, "proprietary or open")
	}
	return f, err == nil
}

func (p *parser) build(a at) string {
	const what = "a BUILD_ID such as 17800.66.78"
	text, ok := p.word(a, what)
	if !ok {
		return ""
	}
	if _, err := target.ParseKernel(text, "lakitu"); err != nil {
		p.want(a, "%s", what)
		return ""
	}
	return text
}

func (p *parser) kernel(a at) Kernel {
	var k Kernel
	seen := p.mapping(a, "a kernel: {build: 17800.66.78}, {milestone: 109, latest: 3} or {latest: 2}", map[string]func(at){
		"build":        func(a at) { k.Build = p.build(a) },
		"milestone":    func(a at) { k.Milestone = p.number(a, minMilestone, maxMilestone, "109") },
		"latest":       func(a at) { k.Latest = p.number(a, 1, maxLatest, "3") },
		"board":        func(a at) { k.Board, _ = p.board(a) },
		"released":     func(a at) { k.Released = p.flag(a) },
		"earlyWarning": func(a at) { k.EarlyWarning = p.flag(a) },
	})
	has := func(name string) bool { return seen[name].node != nil }
	switch {
	case seen == nil:
	case has("build"):
		for _, other := range []string{"milestone", "latest", "released"} {
			if has(other) {
				p.say(seen[other], "found it beside build; want either an exact build or the latest ones")
			}
		}
	case !has("latest") && has("milestone"):
		p.say(seen["milestone"], "found no latest beside it; want how many of its newest builds, such as latest: 3")
	case !has("latest"):
		p.say(a, "found neither build nor latest; want {build: 17800.66.78}, {milestone: 109, latest: 3} or {latest: 2}")
	}
	return k
}

func (p *parser) addDriver(w *Wish, a at) {
	d, ok := p.driver(a)
	switch {
	case !ok:
	case slices.ContainsFunc(w.Drivers, func(have Driver) bool { return have.Wish == d.Wish }):
		p.say(a, "found driver %s twice; want it once", d.Wish)
	default:
		w.Drivers = append(w.Drivers, d)
	}
}

func (p *parser) driver(a at) (Driver, bool) {
	const what = "default, latest, a branch such as R535, or a version such as 535.261.03"
	var d Driver
	if a.node.Kind == yaml.ScalarNode {
		text, ok := p.word(a, what)
		if !ok {
			return d, false
		}
		wish, err := target.ParseGPUWish(text)
		if err != nil {
			p.want(a, "%s", what)
		}
		d.Wish = wish
		return d, err == nil
	}
	before := len(p.mistakes)
	seen := p.mapping(a, "a driver: "+what, map[string]func(at){
		"version": func(a at) {
			text, ok := p.word(a, "a version such as 535.261.03")
			if ok && !target.ValidVersion(text) {
				p.want(a, "a version such as 535.261.03")
			}
			d.Wish = target.Wish(text)
		},
		"branch": func(a at) {
			text, ok := p.word(a, "a branch such as R535")
			if _, is := target.Wish(text).BranchName(); ok && !is {
				p.want(a, "a branch such as R535")
			}
			d.Wish = target.Wish(text)
		},
		"flavours": func(a at) { d.Flavours = words(p, a, "proprietary and open", p.flavour) },
		"labels":   func(a at) { d.Labels = words(p, a, "labels, such as DEFAULT", p.label) },
	})
	_, version := seen["version"]
	_, branch := seen["branch"]
	switch {
	case seen == nil:
	case version == branch:
		p.say(a, "found %s; want either version or branch", map[bool]string{true: "version and branch", false: "neither version nor branch"}[version])
	}
	if len(p.mistakes) > before {
		return d, false
	}
	for i, label := range d.Labels {
		e := at{seen["labels"].node.Content[i], fmt.Sprintf("%s.labels[%d]", a.path, i)}
		p.labels = append(p.labels, labelAt{e, label, d})
	}
	return d, true
}

func (p *parser) label(a at) (string, bool) {
	const what = "DEFAULT, LATEST or a branch such as R535"
	text, ok := p.word(a, what)
	if !ok {
		return "", false
	}
	_, err := target.ParseLabel(text)
	if err != nil {
		p.want(a, "%s", what)
	}
	return text, err == nil
}

func (p *parser) exclude(a at) Exclude {
	x := Exclude{line: a.node.Line}
	seen := p.mapping(a, "a rule such as {build: 17800.66.78, driver: R535, flavour: open}", map[string]func(at){
		"build":     func(a at) { x.Build = p.build(a) },
		"milestone": func(a at) { x.Milestone = p.number(a, minMilestone, maxMilestone, "109") },
		"board":     func(a at) { x.Board, _ = p.board(a) },
		"driver": func(a at) {
			text, ok := p.word(a, "a version or a branch such as R535")
			_, branch := target.Wish(text).BranchName()
			if ok && !branch && !target.ValidVersion(text) {
				p.want(a, "a version or a branch such as R535")
			}
			x.Driver = text
		},
		"flavour": func(a at) { x.Flavour, _ = p.flavour(a) },
		"reason":  func(a at) { x.Reason, _ = p.word(a, "a text") },
	})
	if _, reason := seen["reason"]; seen != nil && (len(seen) == 0 || len(seen) == 1 && reason) {
		p.say(a, "found a rule that takes out everything; want at least one of board, build, driver, flavour or milestone")
	}
	return x
}
