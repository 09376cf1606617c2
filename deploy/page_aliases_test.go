package deploy_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// earlierFlags maps the former names of a program's flags to their present names. It reads the calls of cli.WasCalled
// in the program's source.
func earlierFlags(t *testing.T, program string) map[string]string {
	t.Helper()
	text := func(e ast.Expr) string {
		l, _ := e.(*ast.BasicLit)
		if l == nil {
			return ""
		}
		s, _ := strconv.Unquote(l.Value)
		return s
	}
	earlier := map[string]string{}
	files, err := fs.Glob(os.DirFS(filepath.Join("..", program)), "*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join("..", program, name), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) != 2 {
				return true
			}
			if f, ok := call.Fun.(*ast.SelectorExpr); !ok || f.Sel.Name != "WasCalled" {
				return true
			}
			flag, ok := call.Args[0].(*ast.CallExpr)
			if !ok || text(flag.Args[0]) == "" || text(call.Args[1]) == "" {
				t.Errorf("%s/%s: cli.WasCalled has other arguments than a flag made here and a name", program, name)
				return true
			}
			earlier["--"+text(call.Args[1])] = "--" + text(flag.Args[0])
			return true
		})
	}
	return earlier
}

// TestPageAliases checks that the page of a program uses the present names of its flags, even outside of commands. A
// former name is allowed if another command has a flag of that name.
func TestPageAliases(t *testing.T) {
	t.Parallel()
	all, found := pages(t), 0
	for _, program := range []string{"builder", "server", "fetcher"} {
		p := all[program+"/README.md"]
		if p == nil {
			t.Fatalf("there is no page %s/README.md", program)
		}
		own := map[string]bool{}
		for command, flags := range flagsOf(t) {
			if command == program || strings.HasPrefix(command, program+" ") {
				for f := range flags {
					own[f] = true
				}
			}
		}
		earlier := earlierFlags(t, program)
		found += len(earlier)
		for _, span := range p.Spans {
			flag, _, _ := strings.Cut(span.Text, " ")
			if now := earlier[flag]; now != "" && !own[flag] {
				t.Errorf("%s/README.md:%d: %s has no flag %s any more; want %s", program, span.Line, program, flag, now)
			}
		}
	}
	if found < 6 {
		t.Errorf("the programs have %d flags with former names; want 6 or more: does the test find them all?", found)
	}
}
