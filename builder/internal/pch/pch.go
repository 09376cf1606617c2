// Package pch finds what the sources of a kernel module begin with, where
// several begin alike: the first headers, which are most of what a compiler
// reads. A compiler that precompiles this text once does not read it again for the other sources. It decides by the
// text alone, and refuses whatever it does not understand: a source that is left out is compiled as usual.
package pch

import (
	"cmp"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
)

// Header is a text that some sources begin with.
type Header struct {
	// Text is a header that has the compiler read the same tokens, and leaves
	// the same macros, as the sources' own beginnings do.
	Text string
	// Sources are those that begin so, by slash path.
	Sources []Source
}

// Source begins with a precompiled header.
type Source struct {
	Path string
	// Through are the headers, outermost first, by whose first lines the source
	// reaches its precompiled header: it includes the first one, that one the next. Of
	// each only the guard comes before.
	Through []string
	// First is the path of the first header that the precompiled header includes, if that
	// is the driver's own.
	First string
}

// A precompiled header costs as much as reading three sources, and one that names few of the
// kernel's headers spares none.
const (
	minSources = 4
	minWeight  = 16
	maxDepth   = 8
)

// Find looks through the .c files in the folders right below the tree, each of
// which is one module with flags of its own. Paths in texts begin with root,
// where the compiler will find the tree. The order of the result and
// everything in it follow from the tree's content.
func Find(tree fs.FS, root string) ([]Header, error) {
	t, err := readTree(tree)
	if err != nil {
		return nil, err
	}
	t.root = strings.TrimSuffix(root, "/")
	modules := map[string][]string{}
	for _, name := range slices.Sorted(maps.Keys(t.files)) {
		if dir := path.Dir(name); strings.HasSuffix(name, ".c") && !strings.HasSuffix(name, ".mod.c") && dir != "." &&
			!strings.Contains(dir, "/") {
			modules[dir] = append(modules[dir], name)
		}
	}
	var all []Header
	for _, dir := range slices.Sorted(maps.Keys(modules)) {
		all = append(all, t.choose(modules[dir])...)
	}
	return all, nil
}

// choose takes the header that saves most, then the next one for the
// sources that are left.
func (t *tree) choose(sources []string) []Header {
	begin := map[string][]Source{} // by text
	for _, name := range sources {
		for text, s := range t.prefixes(name) {
			begin[text] = append(begin[text], s)
		}
	}
	weights := map[string]int{}
	for text, some := range begin {
		if len(some) >= minSources {
			weights[text] = t.weight(text)
		}
		if weights[text] < minWeight {
			delete(begin, text)
		}
	}
	var all []Header
	for {
		var best Header
		most := 0
		for _, text := range slices.Sorted(maps.Keys(begin)) {
			if spared := (len(begin[text]) - minSources + 1) * weights[text]; spared > most {
				most, best = spared, Header{Text: text, Sources: begin[text]}
			}
		}
		if most == 0 {
			return all
		}
		all = append(all, best)
		for text, some := range begin {
			begin[text] = slices.DeleteFunc(slices.Clone(some), func(s Source) bool {
				return slices.ContainsFunc(best.Sources, func(b Source) bool { return b.Path == s.Path })
			})
		}
	}
}

// prefixes are all texts that a source may be said to begin with.
func (t *tree) prefixes(name string) map[string]Source {
	all := map[string]Source{}
	var through, before []string // headers gone through, and definitions on the way
	for at := name; at != "" && len(through) < maxDepth; {
		first, included := "", false
		lines := slices.Clone(before)
		for _, d := range t.files[at].head {
			if d.include == "" {
				lines = append(lines, d.text)
				if !included {
					before = append(before, d.text)
				}
				continue
			}
			line, header, ok := t.include(at, d)
			if !ok || t.orderMatters(header, append(slices.Clone(through), name)) {
				break
			}
			if !included {
				first, included = header, true
			}
			lines = append(lines, line)
			if s := (Source{Path: name, First: t.inside(first)}); first != "" || len(through) == 0 {
				for _, header := range through {
					s.Through = append(s.Through, t.inside(header))
				}
				all[strings.Join(lines, "\n")+"\n"] = s
			}
		}
		if t.files[first].guard == "" {
			break // without a guard it would be read twice
		}
		through, at = append(through, first), first
	}
	return all
}

// include turns a line of the file into one that means the same elsewhere, and
// names the header if it is the driver's own. It says no where a compiler's
// flags would decide what is meant.
func (t *tree) include(file string, d directive) (line, header string, ok bool) {
	if strings.HasPrefix(d.include, "<") {
		return "#include " + d.include, "", len(t.named(strings.Trim(d.include, "<>"))) == 0
	}
	name := strings.Trim(d.include, `"`)
	found := t.named(name)
	if len(found) != 1 || path.Clean(name) != name || strings.HasPrefix(name, "../") {
		return "", "", false
	}
	// Beside the file, or where every module of the driver looks.
	for _, dir := range []string{path.Dir(file), "common/inc", "."} {
		if path.Join(dir, name) == found[0] {
			return fmt.Sprintf("#include %q", t.inside(found[0])), found[0], true
		}
	}
	return "", "", false
}

func (t *tree) inside(name string) string {
	if name == "" {
		return ""
	}
	return t.root + "/" + name
}

// orderMatters reports whether a header may say something else if it came before the
// files: it may include one, or asks whether one has been included.
func (t *tree) orderMatters(header string, files []string) bool {
	for name := range t.closure(header) {
		if t.files[name].computed {
			return true // nobody knows what it includes
		}
		for _, f := range files {
			if name == f || t.files[f].guard != "" && slices.Contains(t.files[name].conditions, t.files[f].guard) {
				return true
			}
		}
	}
	return false
}

// weight is roughly how much a text has the compiler read: the kernel's headers
// that it names, which are all about as large with what they include.
func (t *tree) weight(text string) int {
	kernel := map[string]bool{}
	for line := range strings.Lines(text) {
		d, ok := parseDirective(strings.TrimSpace(line))
		if !ok || d.include == "" {
			continue
		}
		if strings.HasPrefix(d.include, "<") {
			kernel[d.include] = true
			continue
		}
		for file := range t.closure(strings.TrimPrefix(strings.Trim(d.include, `"`), t.root+"/")) {
			for _, name := range t.files[file].includes {
				if strings.HasPrefix(name, "<") {
					kernel[name] = true
				}
			}
		}
	}
	return len(kernel)
}

// closure is every file of the driver that a header may lead to, itself too.
// Conditions are not examined, and a name stands for each file that bears it.
func (t *tree) closure(header string) map[string]bool {
	if known := t.closures[header]; known != nil {
		return known
	}
	seen := map[string]bool{}
	todo := []string{header}
	for len(todo) > 0 {
		file := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[file] || file == "" {
			continue
		}
		seen[file] = true
		for _, name := range t.files[file].includes {
			todo = append(todo, t.named(strings.Trim(name, `<>"`))...)
		}
	}
	t.closures[header] = seen
	return seen
}

// named are the files of the driver that an include of this name could mean.
func (t *tree) named(name string) []string {
	var found []string
	for _, file := range t.byBase[path.Base(name)] {
		if file == name || strings.HasSuffix(file, "/"+strings.TrimLeft(name, "./")) {
			found = append(found, file)
		}
	}
	slices.SortFunc(found, cmp.Compare[string])
	return found
}
