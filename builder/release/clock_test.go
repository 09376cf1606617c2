package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// bannedFunctions lists, by import path, functions whose results differ from run to run. An empty list bans the
// package.
var bannedFunctions = map[string][]string{
	"time":                   {"Now", "Since", "Until", "After", "AfterFunc", "NewTicker", "NewTimer", "Tick"},
	"os":                     {"Hostname", "Getpid", "Getppid"},
	"math/rand":              nil,
	"math/rand/v2":           nil,
	"crypto/rand":            nil,
	"hash/maphash":           nil, // its seed is random
	"github.com/google/uuid": nil,
}

// findVarying returns the uses of a clock, a host name, a process number or a random number in a file.
func findVarying(file *ast.File) (found []string) {
	paths := map[string]string{} // by the package's name in the file
	for _, spec := range file.Imports {
		of, err := strconv.Unquote(spec.Path.Value)
		names, listed := bannedFunctions[of]
		if err != nil || !listed {
			continue
		}
		name := path.Base(of)
		if spec.Name != nil {
			name = spec.Name.Name
		}
		if paths[name] = of; len(names) == 0 || name == "." {
			found = append(found, fmt.Sprintf("import %s %q", name, of))
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if use, ok := n.(*ast.SelectorExpr); ok {
			if of, ok := use.X.(*ast.Ident); ok && slices.Contains(bannedFunctions[paths[of.Name]], use.Sel.Name) {
				found = append(found, of.Name+"."+use.Sel.Name)
			}
		}
		return true
	})
	return found
}

// TestAsksNoClock checks that the code for a release uses no clock, no host name and no random number.
func TestAsksNoClock(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	files = append(files, "../internal/sbom/release.go", "../internal/sign/release.go")
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
		for _, use := range findVarying(parsed) {
			t.Errorf("%s uses %s: two releases of one commit would differ", file, use)
		}
	}
	if looked < 5 {
		t.Errorf("looked at %d files; want all of the program", looked)
	}
}

// TestFindsClocks checks that [findVarying] finds each way to a clock or a random number.
func TestFindsClocks(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ imports, use, want string }{
		{`"time"`, "time.Now()", "time.Now"},
		{`"time"`, "time.Until(t)", "time.Until"},
		{`"time"`, "<-time.After(0)", "time.After"},
		{`"time"`, "time.NewTimer", "time.NewTimer"},
		{`clock "time"`, "clock.Since(t)", "clock.Since"},
		{`. "time"`, "Now()", `import . "time"`},
		{`"time"`, "time.Unix(0, 0)", ""},
		{`"os"`, "os.Hostname()", "os.Hostname"},
		{`"os"`, "os.Open(time)", ""},
		{`"crypto/rand"`, "rand.Text()", `import rand "crypto/rand"`},
		{`"crypto/rand"`, "rand.Int(rand.Reader, nil)", `import rand "crypto/rand"`},
		{`"math/rand/v2"`, "rand.N(9)", `import v2 "math/rand/v2"`},
		{`dice "math/rand"`, "dice.Perm(9)", `import dice "math/rand"`},
		{`"github.com/google/uuid"`, "uuid.NewString()", `import uuid "github.com/google/uuid"`},
	} {
		text := "package p\nimport " + row.imports + "\nvar x = " + row.use + "\n"
		parsed, err := parser.ParseFile(token.NewFileSet(), "p.go", text, 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(findVarying(parsed), " "); got != row.want {
			t.Errorf("findVarying(%s in %s) = %q; want %q", row.use, row.imports, got, row.want)
		}
	}
}
