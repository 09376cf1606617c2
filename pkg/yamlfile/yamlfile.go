// Package yamlfile reads YAML files that people write. It reports every mistake with its line and column, what was
// found, and what is wanted. It checks the nodes itself, because the YAML library's errors mention Go types and have no
// column. It does not decide which values make sense.
package yamlfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/prebake/prebake/pkg/fault"
)

// maxMistakes is the largest number of mistakes that an error lists.
const maxMistakes = 100

// At is a node with its path in the file, such as kernels[1].latest; "" means the whole file.
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
	// Name is the name of the file in errors.
	Name string

	mistakes []mistake
}

// Say records a mistake at a node. Its text is "found X; want Y".
func (r *Reader) Say(a At, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if a.Path != "" {
		text = a.Path + ": " + text
	}
	r.mistakes = append(r.mistakes, mistake{max(a.Node.Line, 1), max(a.Node.Column, 1), text})
}

// Want records the usual kind of mistake. Its text describes the found node and the wanted value.
func (r *Reader) Want(a At, format string, args ...any) {
	r.Say(a, "found %s; want %s", Found(a.Node), fmt.Sprintf(format, args...))
}

// Mistakes returns how many mistakes were found so far.
func (r *Reader) Mistakes() int { return len(r.mistakes) }

// Err returns all mistakes as one error of kind Usage, sorted by line and column, or nil. The error's text begins with
// the given activity, such as "read wish list".
func (r *Reader) Err(doing, hint string) error {
	n := len(r.mistakes)
	if n == 0 {
		return nil
	}
	// Not slices.SortStableFunc, which adds 8 KB to each program.
	sort.SliceStable(r.mistakes, func(i, j int) bool {
		a, b := r.mistakes[i], r.mistakes[j]
		return a.line < b.line || a.line == b.line && a.column < b.column
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

// Found describes a node for an error.
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

// Document returns the top node of a file, which must have exactly one document and at most the given number of bytes.
// The error about an empty file says what is wanted. If the result is false, Document has recorded a mistake.
func (r *Reader) Document(data []byte, most int, want string) (At, bool) {
	top := At{Node: &yaml.Node{}}
	if len(data) > most {
		r.Say(top, "the file has more than %d bytes", most)
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
			top.Node.Line, _ = strconv.Atoi(m[1]) // the pattern allows at most nine digits
		}
		r.Say(top, "the file is not YAML: %s", strings.TrimPrefix(text, "yaml: "))
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

// Fields passes the name and value of every known field of a mapping to the callback each, and returns these fields.
// The callback known reports whether a key is known, and must record a mistake if not.
//
// Fields skips a field and records a mistake if the key is repeated or is not a scalar. It does the same if key or
// value is an anchor or alias. If the node is not a mapping, Fields returns nil and records a mistake with the given
// description of the wanted value.
func (r *Reader) Fields(a At, what string, known func(key At) bool, each func(name string, value At)) map[string]At {
	if a.Node.Kind != yaml.MappingNode {
		r.Want(a, "%s", what)
		return nil
	}
	seen := map[string]At{}
	for i := 0; i+1 < len(a.Node.Content); i += 2 {
		key, value := a.Node.Content[i], a.Node.Content[i+1]
		field := At{value, strings.TrimPrefix(a.Path+"."+key.Value, ".")}
		if !r.checkLiteral(At{key, a.Path}) {
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
		if r.checkLiteral(field) {
			each(key.Value, field)
		}
	}
	return seen
}

// checkLiteral refuses aliases and anchors, because a reader easily overlooks a value that is written elsewhere.
func (r *Reader) checkLiteral(a At) bool {
	if a.Node.Kind == yaml.AliasNode || a.Node.Anchor != "" {
		r.Say(a, "found an anchor or alias; want the value itself")
		return false
	}
	return true
}

// Mapping calls the callback of each field of a mapping, by the field's name. A field without a callback is a mistake.
// For the argument named what, and for the result, see [Reader.Fields].
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

// List passes each element of a list to the callback. An empty list is a mistake.
func (r *Reader) List(a At, what string, item func(At)) {
	if a.Node.Kind != yaml.SequenceNode || len(a.Node.Content) == 0 {
		r.Want(a, "a list of %s", what)
		return
	}
	for i, n := range a.Node.Content {
		if e := (At{n, fmt.Sprintf("%s[%d]", a.Path, i)}); r.checkLiteral(e) {
			item(e)
		}
	}
}

// Word reads a scalar as text. What YAML reads as a number stays text too, so that the version 535.10 keeps its zero.
func (r *Reader) Word(a At, what string) (string, bool) {
	if a.Node.Kind != yaml.ScalarNode || a.Node.Tag == "!!null" || a.Node.Value == "" {
		r.Want(a, "%s", what)
		return "", false
	}
	return a.Node.Value, true
}

// Number reads an integer between two bounds.
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

// Bool reads true or false. The other words that YAML 1.1 allows are mistakes.
func (r *Reader) Bool(a At) bool {
	if a.Node.Kind != yaml.ScalarNode || a.Node.Tag != "!!bool" {
		r.Want(a, "true or false")
		return false
	}
	return strings.EqualFold(a.Node.Value, "true")
}
