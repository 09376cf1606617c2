// Package yamlfile reads YAML files that people write, and names every mistake with its line
// and column: what was found, and what is wanted. It walks the nodes of the file, since the
// library's own errors name Go types, have no column, and end at the first mistake of some
// kinds. It refuses to know what a file means: its callers do.
package yamlfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/prebake/prebake/pkg/fault"
)

// maxMistakes is how many mistakes an error lists.
const maxMistakes = 100

// At is a node and the way to it, such as kernels[1].latest; "" means the whole file.
type At struct {
	Node *yaml.Node
	Path string
}

type mistake struct {
	line, column int
	text         string
}

// Reader reads one file and collects its mistakes.
type Reader struct {
	// Name is what errors call the file.
	Name string

	mistakes []mistake
}

// Say records a mistake at a node.
func (r *Reader) Say(a At, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if a.Path != "" {
		text = a.Path + ": " + text
	}
	r.mistakes = append(r.mistakes, mistake{max(a.Node.Line, 1), max(a.Node.Column, 1), text})
}

// Want records the usual mistake: one thing was found, another is wanted.
func (r *Reader) Want(a At, format string, args ...any) {
	r.Say(a, "found %s; want %s", Found(a.Node), fmt.Sprintf(format, args...))
}

// Mistakes returns how many mistakes were found so far.
func (r *Reader) Mistakes() int { return len(r.mistakes) }

// Err returns the mistakes as one error of kind Usage, sorted by line and column; nil where
// there is none. doing says what the file is read for, such as "read wish list".
func (r *Reader) Err(doing, hint string) error {
	n := len(r.mistakes)
	if n == 0 {
		return nil
	}
	slices.SortStableFunc(r.mistakes, func(a, b mistake) int {
		if a.line != b.line {
			return a.line - b.line
		}
		return a.column - b.column
	})
	text := &strings.Builder{}
	fmt.Fprintf(text, "%s: %d mistake", doing, n)
	if n > 1 {
		text.WriteString("s")
	}
	for i, m := range r.mistakes {
		if i == maxMistakes {
			fmt.Fprintf(text, "\nand %d more", n-i)
			break
		}
		fmt.Fprintf(text, "\n%s:%d:%d: %s", r.Name, m.line, m.column, m.text)
	}
	return fault.New(fault.Usage, text.String(), hint)
}

// Found names a node in an error.
func Found(n *yaml.Node) string {
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

// Document returns the top node of a file of at most so many bytes, which has to hold one
// document. want says what an empty file should have.
func (r *Reader) Document(data []byte, most int, want string) (At, bool) {
	top := At{Node: &yaml.Node{}}
	if len(data) > most {
		r.Say(top, "more than %d bytes", most)
		return top, false
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, more yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		r.Say(top, "found an empty file; want %s", want)
		return top, false
	case err != nil:
		text := err.Error()
		if m := syntaxLine.FindStringSubmatch(text); m != nil {
			text = text[len(m[0]):]
			top.Node.Line, _ = strconv.Atoi(m[1]) // at most nine digits
		}
		r.Say(top, "not YAML: %s", strings.TrimPrefix(text, "yaml: "))
		return top, false
	}
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		r.Say(At{Node: &more}, "found a second document; want one in a file")
	}
	if len(doc.Content) != 1 {
		r.Say(top, "found an empty file; want %s", want)
		return top, false
	}
	return At{Node: doc.Content[0]}, true
}

// Fields calls each with every key of a mapping and its value. A key that comes twice or is no
// scalar, and anchors and aliases of keys and values, are mistakes, and are left out. known
// returns whether the key is known; it records what is wrong with one that is not. Fields
// returns the known fields; nil where the node is no mapping, which is a mistake: what says
// what is wanted.
func (r *Reader) Fields(a At, what string, known func(key At) bool, each func(name string, value At)) map[string]At {
	if a.Node.Kind != yaml.MappingNode {
		r.Want(a, "%s", what)
		return nil
	}
	seen := map[string]At{}
	for i := 0; i+1 < len(a.Node.Content); i += 2 {
		key, value := a.Node.Content[i], a.Node.Content[i+1]
		field := At{value, strings.TrimPrefix(a.Path+"."+key.Value, ".")}
		if !r.literal(At{key, a.Path}) {
			continue
		}
		if key.Kind != yaml.ScalarNode {
			r.Want(At{key, a.Path}, "the name of a field")
			continue
		}
		if !known(At{key, a.Path}) {
			continue
		}
		if _, twice := seen[key.Value]; twice {
			r.Say(At{key, a.Path}, "found field %q twice; want it once", key.Value)
			continue
		}
		seen[key.Value] = field
		if r.literal(field) {
			each(key.Value, field)
		}
	}
	return seen
}

// literal refuses aliases and anchors: a value that stands elsewhere is easily overlooked.
func (r *Reader) literal(a At) bool {
	if a.Node.Kind == yaml.AliasNode || a.Node.Anchor != "" {
		r.Say(a, "found an anchor or alias; want the value itself")
		return false
	}
	return true
}

// Mapping calls the function of each field. A field without one is a mistake, too.
func (r *Reader) Mapping(a At, what string, fields map[string]func(At)) map[string]At {
	return r.Fields(a, what, func(key At) bool {
		if _, ok := fields[key.Node.Value]; ok {
			return true
		}
		r.Say(key, "found field %s; want %s", Found(key.Node), oneOf(fields))
		return false
	}, func(name string, value At) { fields[name](value) })
}

func oneOf(fields map[string]func(At)) string {
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

// List calls item for each element of a list that has to have some.
func (r *Reader) List(a At, what string, item func(At)) {
	if a.Node.Kind != yaml.SequenceNode || len(a.Node.Content) == 0 {
		r.Want(a, "a list of %s", what)
		return
	}
	for i, n := range a.Node.Content {
		if e := (At{n, fmt.Sprintf("%s[%d]", a.Path, i)}); r.literal(e) {
			item(e)
		}
	}
}

// Word reads a scalar as its text: numbers in YAML's eyes are text here, so that a version
// 535.10 stays what it is.
func (r *Reader) Word(a At, what string) (string, bool) {
	if a.Node.Kind != yaml.ScalarNode || a.Node.Tag == "!!null" || a.Node.Value == "" {
		r.Want(a, "%s", what)
		return "", false
	}
	return a.Node.Value, true
}

// Number reads a whole number between two bounds.
func (r *Reader) Number(a At, least, most int, example string) int {
	what := fmt.Sprintf("a number from %d to %d, such as %s", least, most, example)
	text, ok := r.Word(a, what)
	if !ok {
		return 0
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > most || a.Node.Tag != "!!int" {
		r.Want(a, "%s", what)
		return 0
	}
	return n
}

// Bool reads true or false; YAML 1.1's other words for them are mistakes.
func (r *Reader) Bool(a At) bool {
	if a.Node.Kind != yaml.ScalarNode || a.Node.Tag != "!!bool" {
		r.Want(a, "true or false")
		return false
	}
	return strings.EqualFold(a.Node.Value, "true")
}
