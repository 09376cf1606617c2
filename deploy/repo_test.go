package deploy_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// root is the repository's top folder as seen from this package.
const root = ".."

const module = "github.com/prebake/prebake/"

// files returns the repository's files with these endings, relative to root, without the folders of builds and tools.
func files(t *testing.T, endings ...string) []string {
	t.Helper()
	var found []string
	err := fs.WalkDir(os.DirFS(root), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			switch path.Base(name) {
			case ".git", "bin", ".cache", "testdata", "node_modules":
				return fs.SkipDir
			}
			return nil
		}
		for _, ending := range endings {
			if strings.HasSuffix(name, ending) {
				found = append(found, name)
				break
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestPackageComments(t *testing.T) {
	t.Parallel()
	comments := map[string]int{}
	for _, name := range files(t, ".go") {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, name), nil,
			parser.ParseComments|parser.PackageClauseOnly)
		if err != nil {
			t.Errorf("parse %s: %v", name, err)
			continue
		}
		dir := path.Dir(name)
		comments[dir] += 0
		if file.Doc == nil || len(strings.TrimSpace(file.Doc.Text())) == 0 {
			continue
		}
		comments[dir]++
		want := "Package " + file.Name.Name + " "
		if file.Name.Name == "main" {
			want = "Command " + path.Base(dir) + " "
		}
		if !strings.HasPrefix(file.Doc.Text(), want) {
			t.Errorf("%s: package comment starts %.30q; want %q", name, file.Doc.Text(), want)
		}
	}
	for dir, n := range comments {
		if n != 1 {
			t.Errorf("package %s has %d package comments; want one that says what it is for and what it refuses", dir, n)
		}
	}
}

// walls lists, for each folder, the packages that its files must not import, and why. All rows that match a file apply.
var walls = []struct {
	below, banned, why string
}{
	{"builder/", module + "server", "components share pkg only"},
	{"builder/", module + "fetcher", "components share pkg only"},
	{"server/", module + "builder", "components share pkg only"},
	{"server/", module + "fetcher", "components share pkg only"},
	{"fetcher/", module + "builder", "the fetcher runs the builder as a program"},
	{"fetcher/", module + "server", "components share pkg only"},
	{"fetcher/", module + "pkg/queue", "a node has no business in the queue"},
	{"fetcher/", "database/sql", "the fetcher links no database"},
	{"pkg/", module + "builder", "pkg is below the components"},
	{"pkg/", module + "server", "pkg is below the components"},
	{"pkg/", module + "fetcher", "pkg is below the components"},
	{"pkg/fault", module, "fault is at the bottom"},
	{"pkg/target", module, "target is at the bottom"},
}

func TestImports(t *testing.T) {
	t.Parallel()
	for _, name := range files(t, ".go") {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, name), nil, parser.ImportsOnly)
		if err != nil {
			t.Errorf("parse %s: %v", name, err)
			continue
		}
		for _, spec := range file.Imports {
			checkImport(t, name, spec)
		}
	}
}

func checkImport(t *testing.T, name string, spec *ast.ImportSpec) {
	t.Helper()
	imported, err := strconv.Unquote(spec.Path.Value)
	if err != nil {
		t.Errorf("%s imports %s: %v", name, spec.Path.Value, err)
		return
	}
	for _, wall := range walls {
		if strings.HasPrefix(name, wall.below) && strings.HasPrefix(imported, wall.banned) {
			t.Errorf("%s imports %s: %s", name, imported, wall.why)
		}
	}
	// Only programs may use the package for terminal output.
	if imported == module+"pkg/cli" && !isProgram(name) && !testsPrograms(name) {
		t.Errorf("%s imports %s: only programs do", name, imported)
	}
	if strings.HasPrefix(imported, "github.com/urfave/cli") && !isProgram(name) && !testsPrograms(name) &&
		!strings.HasPrefix(name, "pkg/cli/") {
		t.Errorf("%s imports %s: only programs and pkg/cli do", name, imported)
	}
}

// testsPrograms reports whether a file belongs to a package that only tests of package main use.
func testsPrograms(name string) bool {
	return strings.HasPrefix(name, "pkg/testkit/clidoc/") || strings.HasPrefix(name, "pkg/testkit/configcheck/")
}

// isProgram reports whether a file is part of package main.
func isProgram(name string) bool {
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, name), nil, parser.PackageClauseOnly)
	return err == nil && file.Name.Name == "main"
}

func TestFileLength(t *testing.T) {
	t.Parallel()
	const most = 500
	for _, name := range files(t, ".go") {
		text := read(t, name)
		if lines := strings.Count(text, "\n"); lines > most && !strings.Contains(text[:min(len(text), 200)], "DO NOT EDIT") {
			t.Errorf("%s has %d lines; want at most %d: split it by what it holds", name, lines, most)
		}
	}
}

// foreignHosts are host names that only a machine's own configuration may contain.
var foreignHosts = []string{
	"deb." + "debian.org", "security." + "debian.org", "ftp." + "debian.org", "snapshot." + "debian.org",
	"proxy." + "golang.org", "sum." + "golang.org", "registry." + "npmjs.org",
}

func TestNoForeignHosts(t *testing.T) {
	t.Parallel()
	for _, name := range files(t, "") {
		if name == "go.sum" {
			continue
		}
		text := read(t, name)
		for _, word := range foreignHosts {
			if strings.Contains(text, word) {
				t.Errorf("%s names %s: take it from the machine's configuration", name, word)
			}
		}
	}
}

var (
	makeTarget  = regexp.MustCompile(`(?m)^([a-z0-9-]+):.*## `)
	makeMention = regexp.MustCompile("`make ([a-z0-9-]+)")
)

func TestMakeTargetsInDocumentsExist(t *testing.T) {
	t.Parallel()
	targets := map[string]bool{}
	for _, match := range makeTarget.FindAllStringSubmatch(read(t, "Makefile"), -1) {
		targets[match[1]] = true
	}
	for _, name := range files(t, ".md") {
		for _, match := range makeMention.FindAllStringSubmatch(read(t, name), -1) {
			if !targets[match[1]] {
				t.Errorf("%s has the command make %s, but the Makefile has no such target", name, match[1])
			}
		}
	}
}
