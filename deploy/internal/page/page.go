// Package page reads the repository's Markdown pages: their headings, links, code spans and code blocks. Tests use it
// to check links, and to run the commands on a page. It never follows a link.
package page

import (
	"strconv"
	"strings"
	"unicode"

	"github.com/yuin/goldmark"
	"github.com/yuin/goldmark/ast"
	"github.com/yuin/goldmark/extension"
	"github.com/yuin/goldmark/text"
)

// Page is one Markdown file.
type Page struct {
	// Anchors are the fragments that a link to the page may have.
	Anchors map[string]bool
	// Links are the targets of links and images, as the page has them.
	Links []Text
	// Spans are the inline code spans: the texts between backquotes.
	Spans []Text
	// Blocks are the fenced code blocks.
	Blocks []Block
}

// Text is a piece of a page, with its line number; the first line is 1.
type Text struct {
	Text string
	Line int
}

// Block is a fenced code block.
type Block struct {
	// Language is the first word after the fence, such as sh; "" means none.
	Language string
	// Run is true if the second word after the fence is "run". A test then runs the block.
	Run bool
	// Section is the anchor of the heading above the block.
	Section string
	// Text is the block without its fences. Line is the number of its first line.
	Text string
	Line int
}

var parser = goldmark.New(goldmark.WithExtensions(extension.GFM)).Parser()

// Parse reads a page.
func Parse(source []byte) *Page {
	p := &Page{Anchors: map[string]bool{}}
	seen := map[string]int{}
	section := ""
	line := 1
	// Neither the callback nor Walk ever returns an error.
	_ = ast.Walk(parser.Parse(text.NewReader(source)), func(n ast.Node, entering bool) (ast.WalkStatus, error) {
		if !entering {
			return ast.WalkContinue, nil
		}
		if n.Type() == ast.TypeBlock && n.Lines().Len() > 0 {
			line = lineAt(source, n.Lines().At(0).Start)
		}
		switch n := n.(type) {
		case *ast.Heading:
			section = anchor(plainText(n, source), seen)
			p.Anchors[section] = true
		case *ast.Link:
			p.Links = append(p.Links, Text{string(n.Destination), line})
		case *ast.Image:
			p.Links = append(p.Links, Text{string(n.Destination), line})
		case *ast.CodeSpan:
			at := line
			if first, ok := n.FirstChild().(*ast.Text); ok {
				at = lineAt(source, first.Segment.Start)
			}
			p.Spans = append(p.Spans, Text{strings.Join(strings.Fields(plainText(n, source)), " "), at})
		case *ast.FencedCodeBlock:
			p.Blocks = append(p.Blocks, block(n, source, section))
		}
		return ast.WalkContinue, nil
	})
	return p
}

func block(n *ast.FencedCodeBlock, source []byte, section string) Block {
	b := Block{Section: section, Text: string(n.Lines().Value(source))}
	if n.Info != nil {
		words := strings.Fields(string(n.Info.Value(source)))
		if len(words) > 0 {
			b.Language = words[0]
		}
		b.Run = len(words) > 1 && words[1] == "run"
	}
	if n.Lines().Len() > 0 {
		b.Line = lineAt(source, n.Lines().At(0).Start)
	}
	return b
}

func lineAt(source []byte, offset int) int {
	return 1 + strings.Count(string(source[:offset]), "\n")
}

// plainText returns the text of a node and its children, without markup.
func plainText(n ast.Node, source []byte) string {
	var b strings.Builder
	_ = ast.Walk(n, func(n ast.Node, entering bool) (ast.WalkStatus, error) {
		switch n := n.(type) {
		case *ast.Text:
			if entering {
				b.Write(n.Segment.Value(source))
				if n.SoftLineBreak() {
					b.WriteByte(' ')
				}
			}
		case *ast.String:
			if entering {
				b.Write(n.Value)
			}
		}
		return ast.WalkContinue, nil
	})
	return b.String()
}

// anchor returns the fragment that GitHub gives to a heading, as "Section links" describes it:
// https://docs.github.com/en/get-started/writing-on-github/getting-started-with-writing-and-formatting-on-github/basic-writing-and-formatting-syntax
// Letters become lower case, spaces become hyphens, and punctuation is removed. If the page already has the fragment,
// anchor adds a number to it. seen maps each fragment of the page so far to the last number that was added to it.
func anchor(heading string, seen map[string]int) string {
	name := strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r) || unicode.IsMark(r):
			return unicode.ToLower(r)
		}
		return -1
	}, strings.TrimSpace(heading))
	unique := name
	for {
		if _, taken := seen[unique]; !taken {
			break
		}
		seen[name]++
		unique = name + "-" + strconv.Itoa(seen[name])
	}
	seen[unique] = 0
	return unique
}
