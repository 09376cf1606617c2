package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"
)

// TestAsksNoClock checks that the code that makes a release uses no clock, no host name and no random number. Only a
// throw-away key needs a random number, and package sign makes that key.
func TestAsksNoClock(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	files = append(files, "../internal/sbom/release.go", "../internal/sign/release.go")
	banned := map[string]bool{
		"time.Now": true, "time.Since": true, "os.Hostname": true, "rand.Read": true, "uuid.New": true,
	}
	looked := 0
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		looked++
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			if call, ok := n.(*ast.SelectorExpr); ok {
				if of, ok := call.X.(*ast.Ident); ok && banned[of.Name+"."+call.Sel.Name] {
					t.Errorf("%s uses %s.%s: two releases would differ", file, of.Name, call.Sel.Name)
				}
			}
			return true
		})
	}
	if looked < 5 {
		t.Errorf("looked at %d files; want all of the program", looked)
	}
}
