// Package pch finds the text with which several sources of a kernel module begin. The includes in this text are most of
// what a compiler reads for a source. With a precompiled header, the compiler reads them only once. The package looks
// only at the text of the files. It leaves out a source if it cannot tell what the source's first lines include.
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

// Header is a text with which some sources begin.
type Header struct {
	// Text is the content of the precompiled header. It gives the compiler the same tokens and macros as the beginnings of
	// the sources.
	Text string
	// Sources are the sources that begin with this text.
	Sources []Source
}

// Source is a source that begins with the text of a precompiled header.
type Source struct {
	// Path is the source's path in the tree.
	Path string
	// Through lists the headers between the source and the text of the precompiled header. The source includes the first
	// of them, and each includes the next. Before that include line, there are only definitions and include guards.
	Through []string
	// First is the path of the first header that the precompiled header includes, or "" for a header of the kernel.
	First string
}

// These constants decide which text is worth precompiling. Precompiling takes as long as reading the text for three
// sources, so at least minSources sources must begin with it. The text must include at least minWeight of the kernel's
// headers. maxDepth is the maximum number of headers between a source and the text.
const (
	minSources = 4
	minWeight  = 16
	maxDepth   = 8
)

// Find examines the .c files in the top-level folders of the tree. Each folder is one module with its own flags. root
// is the path at which the compiler finds the tree. The result depends only on the content of the tree. Find returns an
// error if it cannot read a file, or if a .c or .h file is larger than maxFile.
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

// choose returns the precompiled headers for the sources of one module. A source gets at most one.
func (t *tree) choose(sources []string) []Header {
	begin := map[string][]Source{} // sources by text
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

// prefixes returns the texts with which a source begins, and for each text the entry for Header.Sources. Each text ends
// after an include line.
func (t *tree) prefixes(name string) map[string]Source {
	all := map[string]Source{}
	var through, before []string // the headers between source and text; the definitions before these headers
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
			if s := (Source{Path: name, First: t.pathOf(first)}); first != "" || len(through) == 0 {
				for _, header := range through {
					s.Through = append(s.Through, t.pathOf(header))
				}
				all[strings.Join(lines, "\n")+"\n"] = s
			}
		}
		if t.files[first].guard == "" {
			break // the compiler would read a header without a guard twice
		}
		through, at = append(through, first), first
	}
	return all
}

// include rewrites an include line so that it means the same in another file. header is the path of a driver's header
// in the tree. ok is false if the meaning depends on the compiler's flags.
func (t *tree) include(file string, d directive) (line, header string, ok bool) {
	if strings.HasPrefix(d.include, "<") {
		return "#include " + d.include, "", len(t.filesFor(strings.Trim(d.include, "<>"))) == 0
	}
	name := strings.Trim(d.include, `"`)
	found := t.filesFor(name)
	if len(found) != 1 || path.Clean(name) != name || strings.HasPrefix(name, "../") {
		return "", "", false
	}
	// The header is beside the file, or in a folder where every module of the driver looks for headers.
	for _, dir := range []string{path.Dir(file), "common/inc", "."} {
		if path.Join(dir, name) == found[0] {
			return fmt.Sprintf("#include %q", t.pathOf(found[0])), found[0], true
		}
	}
	return "", "", false
}

// pathOf returns the path at which the compiler finds a file of the tree. For "" it returns "".
func (t *tree) pathOf(name string) string {
	if name == "" {
		return ""
	}
	return t.root + "/" + name
}

// orderMatters reports whether a header may mean something else if the compiler reads it before the given files. This
// is so if the header may include one of the files, or has a condition on the include guard of one of them.
func (t *tree) orderMatters(header string, files []string) bool {
	for name := range t.closure(header) {
		if t.files[name].computed {
			return true // the included file is unknown
		}
		for _, f := range files {
			if name == f || t.files[f].guard != "" && slices.Contains(t.files[name].conditions, t.files[f].guard) {
				return true
			}
		}
	}
	return false
}

// weight estimates how much the compiler reads for a text, by the number of kernel headers. It assumes that all kernel
// headers, with their includes, have about the same size.
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

// closure returns every file of the driver that a header may include, directly or not, and the header itself. It
// ignores conditions. If an include line could mean several files, closure returns all of them.
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
			todo = append(todo, t.filesFor(strings.Trim(name, `<>"`))...)
		}
	}
	t.closures[header] = seen
	return seen
}

// filesFor returns the files of the driver that an include line with this name could mean.
func (t *tree) filesFor(name string) []string {
	var found []string
	for _, file := range t.byBase[path.Base(name)] {
		if file == name || strings.HasSuffix(file, "/"+strings.TrimLeft(name, "./")) {
			found = append(found, file)
		}
	}
	slices.SortFunc(found, cmp.Compare[string])
	return found
}
