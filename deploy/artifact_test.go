package deploy_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/deploy/internal/page"
)

// formatName matches Prebake's own annotations, media types and predicate types.
var formatName = regexp.MustCompile(
	`^(dev\.prebake\.[a-z.-]+|application/vnd\.prebake\.[a-z0-9.+-]+|https://prebake\.dev/[a-z-]+/v[0-9]+)$`)

// TestArtifactPage checks that the page about the artifact's format has exactly the names that the source has.
func TestArtifactPage(t *testing.T) {
	t.Parallel()
	var want, got []string
	for _, name := range files(t, ".go") {
		if strings.HasSuffix(name, "_test.go") || strings.Contains(name, "testkit/") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, name), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if lit, ok := n.(*ast.BasicLit); ok && formatName.MatchString(text(lit)) {
				want = append(want, text(lit))
			}
			return true
		})
	}
	for _, span := range page.Parse([]byte(read(t, "docs/reference/artifact.md"))).Spans {
		if formatName.MatchString(span.Text) {
			got = append(got, span.Text)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(slices.Compact(want), slices.Compact(got)); diff != "" {
		t.Errorf("names in docs/reference/artifact.md (-source +page):\n%s", diff)
	}
}
