package deploy_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// partsFile declares TestPartsOnRealInputs. Its rows run the tests that are skipped without a real kernel, a real
// driver or another project's program.
const partsFile = "deploy/e2e/parts_test.go"

// part is a row of TestPartsOnRealInputs.
type part struct {
	folders []string
	run     *regexp.Regexp
}

// TestNoTestIsAlwaysSkipped checks that a row of TestPartsOnRealInputs runs each test that lacks something in a plain
// make test: an input in an environment variable that a row sets, an emulator, or a program. A program or database that
// deploy/setup.sh installs belongs to package installed, which does not skip the test there.
func TestNoTestIsAlwaysSkipped(t *testing.T) {
	t.Parallel()
	parts, variables := readParts(t)
	if len(parts) < 20 || !slices.Contains(variables, "PREBAKE_BOOT") {
		t.Fatalf("%s has %d rows, which set %v; want 20 rows or more", partsFile, len(parts), variables)
	}
	folders := map[string][]*ast.FuncDecl{}
	for _, name := range files(t, "_test.go") {
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, name), nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Body != nil {
				folders[path.Dir(name)] = append(folders[path.Dir(name)], f)
			}
		}
	}
	found := 0
	for folder, functions := range folders {
		for test, lack := range skipped(functions, append(variables, "PREBAKE_TEST_POSTGRES")) {
			found++
			if !slices.ContainsFunc(parts, func(p part) bool {
				return slices.Contains(p.folders, folder) && p.run.MatchString(test)
			}) {
				t.Errorf("%s: %s is skipped without %s, and no row of %s runs it: add a row, or use package installed",
					folder, test, lack, partsFile)
			}
		}
	}
	if found < 30 {
		t.Errorf("found %d tests that need more than make test has; want 30 or more", found)
	}
}

// readParts returns the rows of TestPartsOnRealInputs, and the environment variables that they set.
func readParts(t *testing.T) (parts []part, variables []string) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, partsFile), nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{} // last text that a variable gets
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			if name, ok := n.Lhs[0].(*ast.Ident); ok && len(n.Rhs) == 1 {
				if text, ok := textOf(n.Rhs[0], nil); ok {
					texts[name.Name] = text
				}
			}
		case *ast.BasicLit:
			if text, ok := textOf(n, nil); ok && strings.HasPrefix(text, "PREBAKE_") {
				name, _, _ := strings.Cut(text, "=")
				variables = append(variables, name)
			}
		case *ast.CompositeLit:
			if len(n.Elts) != 4 {
				return true
			}
			folders, ok := textOf(n.Elts[1], nil)
			run, also := textOf(n.Elts[2], texts)
			if !ok || !also || !strings.HasPrefix(folders, "./") {
				return true
			}
			parts = append(parts, part{strings.Fields(strings.ReplaceAll(folders, "./", "")), regexp.MustCompile(run)})
		}
		return true
	})
	return parts, variables
}

// textOf returns the value of a string literal, of a variable in texts, or of a sum of these.
func textOf(e ast.Expr, texts map[string]string) (text string, ok bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		return text, err == nil && e.Kind == token.STRING
	case *ast.Ident:
		text, ok := texts[e.Name]
		return text, ok
	case *ast.BinaryExpr:
		left, ok := textOf(e.X, texts)
		right, also := textOf(e.Y, texts)
		return left + right, ok && also
	}
	return "", false
}

// skipped returns the tests of a folder that are skipped if something is missing, and what that is. Such a test calls a
// function that looks for one of the variables or for a program and can skip the test, or one that starts an emulator.
// The call may go through other functions of the folder.
func skipped(functions []*ast.FuncDecl, variables []string) map[string]string {
	lacks, uses := map[string]string{}, map[string][]string{}
	for _, f := range functions {
		lack, skips := "", false
		ast.Inspect(f.Body, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.BasicLit:
				if text, ok := textOf(n, nil); ok && slices.Contains(variables, text) {
					lack = text
				}
			case *ast.Ident:
				uses[f.Name.Name] = append(uses[f.Name.Name], n.Name)
			case *ast.SelectorExpr:
				of, _ := n.X.(*ast.Ident)
				switch {
				case n.Sel.Name == "Skip" || n.Sel.Name == "Skipf":
					skips = true
				case of != nil && of.Name == "exec" && n.Sel.Name == "LookPath":
					lack = "a program on PATH"
				case of != nil && (of.Name == "gcs" || of.Name == "cluster") && n.Sel.Name == "Start":
					lack, skips = "an emulated "+of.Name, true
				case of != nil && of.Name == "cluster" && n.Sel.Name == "Env":
					lack = "kubectl"
				}
			}
			return true
		})
		if lack != "" && skips {
			lacks[f.Name.Name] = lack
		}
	}
	for grown := true; grown; {
		grown = false
		for name, used := range uses {
			for _, other := range used {
				if lack, ok := lacks[other]; ok && lacks[name] == "" {
					lacks[name], grown = lack, true
				}
			}
		}
	}
	for name := range lacks {
		if !strings.HasPrefix(name, "Test") {
			delete(lacks, name)
		}
	}
	return lacks
}
