package deploy_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
)

// wayRow matches a row of the table in CONTRIBUTING.md: number, text, file, function.
var wayRow = regexp.MustCompile("(?m)^\\| [0-9]+ \\| [^|]+ \\| `([^`]+)` \\| `([^`]+)` \\|$")

// TestContributingNamesFunctions checks that each function in the table of CONTRIBUTING.md exists.
func TestContributingNamesFunctions(t *testing.T) {
	t.Parallel()
	rows := wayRow.FindAllStringSubmatch(read(t, "CONTRIBUTING.md"), -1)
	if len(rows) != 20 {
		t.Errorf("CONTRIBUTING.md has %d rows from BUILD_ID to a loaded module; want 20", len(rows))
	}
	for _, row := range rows {
		name, function := row[1], row[2]
		got, err := functions(filepath.Join(root, name))
		if err != nil || !slices.Contains(got, function) {
			t.Errorf("functions(%s) = %v, %v; want %s among them", name, got, err, function)
		}
	}
}

// functions returns the functions that a file declares. A method is named Type.Method.
func functions(name string) (all []string, err error) {
	file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	for _, d := range file.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		if f.Recv == nil {
			all = append(all, f.Name.Name)
			continue
		}
		of := f.Recv.List[0].Type
		if star, ok := of.(*ast.StarExpr); ok {
			of = star.X
		}
		if id, ok := of.(*ast.Ident); ok {
			all = append(all, id.Name+"."+f.Name.Name)
		}
	}
	return all, nil
}
