package deploy_test

import (
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/prebake/prebake/deploy/internal/page"
)

// pages returns the repository's Markdown files by name.
func pages(t *testing.T) map[string]*page.Page {
	t.Helper()
	all := map[string]*page.Page{}
	for _, name := range files(t, ".md") {
		all[name] = page.Parse([]byte(read(t, name)))
	}
	return all
}

// TestPageLinks checks that each link within the repository leads to an existing file and heading.
func TestPageLinks(t *testing.T) {
	t.Parallel()
	all := pages(t)
	for name, p := range all {
		for _, link := range p.Links {
			target, err := url.Parse(link.Text)
			if err != nil {
				t.Errorf("%s:%d links to %s: %v", name, link.Line, link.Text, err)
				continue
			}
			if target.Scheme != "" || target.Host != "" {
				continue
			}
			file := name
			if target.Path != "" {
				file = path.Join(path.Dir(name), target.Path)
			}
			if _, err := os.Stat(filepath.Join(root, file)); err != nil {
				t.Errorf("%s:%d links to %s: no such file", name, link.Line, link.Text)
				continue
			}
			if target.Fragment != "" && (all[file] == nil || !all[file].Anchors[target.Fragment]) {
				t.Errorf("%s:%d links to %s: no such heading", name, link.Line, link.Text)
			}
		}
	}
}

// TestPagesAreReached checks that links lead from the README to each page of docs.
func TestPagesAreReached(t *testing.T) {
	t.Parallel()
	all := pages(t)
	reached := map[string]bool{"README.md": true}
	for next := []string{"README.md"}; len(next) > 0; next = next[1:] {
		for _, link := range all[next[0]].Links {
			target, _, _ := strings.Cut(link.Text, "#")
			file := path.Join(path.Dir(next[0]), target)
			if all[path.Join(file, "README.md")] != nil {
				file = path.Join(file, "README.md")
			}
			if all[file] != nil && !reached[file] {
				reached[file] = true
				next = append(next, file)
			}
		}
	}
	for name := range all {
		if strings.HasPrefix(name, "docs/") && !reached[name] {
			t.Errorf("no link leads from README.md to %s", name)
		}
	}
}

// pathSpan matches a path of the repository, as pages write it between backquotes.
var pathSpan = regexp.MustCompile(`^\.{0,2}/?[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)+/?$`)

// goName matches a package path with an exported name, such as pkg/queue.Open.
var goName = regexp.MustCompile(`^(.*/[a-z0-9]+)\.[A-Z]\w*$`)

// TestPagePaths checks the paths between backquotes. A path that begins with a top folder must exist, from the
// repository's top or from the page's own folder.
func TestPagePaths(t *testing.T) {
	t.Parallel()
	folders := map[string]bool{}
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		folders[e.Name()] = e.IsDir() && e.Name() != "bin" // programs there are built, so they may be missing
	}
	for name, p := range pages(t) {
		if name == "CHANGELOG.md" {
			continue // it describes former versions
		}
		for _, span := range p.Spans {
			top, _, _ := strings.Cut(span.Text, "/")
			if !pathSpan.MatchString(span.Text) || !folders[top] {
				continue
			}
			file := goName.ReplaceAllString(span.Text, "$1")
			_, err := os.Stat(filepath.Join(root, file))
			_, beside := os.Stat(filepath.Join(root, path.Dir(name), file))
			if err != nil && beside != nil {
				t.Errorf("%s:%d names %s: no such file", name, span.Line, span.Text)
			}
		}
	}
}
