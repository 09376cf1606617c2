package compile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Objects are kept as one tree for each driver and view: what make left for
// every source file, which is the object and the .cmd file that make compares
// with what it would do. make stays the judge: a command or a time that does
// not fit has the file compiled again.
//
// An object is kept only if nothing that a view hides went into it. Its .cmd
// file lists what was read, and those files are searched for the hidden names,
// so that is known, not assumed. The .mod.c files,
// which carry a kernel's release and salt, are never kept.
const objectsKind = "objects-1"

var errNoObjects = errors.New("no objects are kept")

// objectsKey names the objects of this build. There is none without digests of
// everything that decides them.
func (a *aid) objectsKey() string {
	h := sha256.New()
	parts := []string{objectsKind, Recipe, a.view.Digest, a.r.ToolchainDigest, a.r.SourceDigest, string(a.r.Driver.Flavour), a.digest()}
	for _, arg := range a.args {
		if !strings.HasPrefix(arg, "KERNEL_UNAME=") {
			parts = append(parts, arg)
		}
	}
	if a.debug {
		// Debug information may tell of a header's content what the code does
		// not: compilers put checksums of files into it. Siblings share none.
		parts = append(parts, "debug", a.r.Release, a.r.HeaderDigest)
	}
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s\n", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// restore puts kept objects into the staged sources and returns how many.
func (a *aid) restore(ctx context.Context) (int, error) {
	dir, cached, err := a.r.Cache.Tree(ctx, objectsKind, a.objectsKey(), func(context.Context, string) error { return errNoObjects })
	if errors.Is(err, errNoObjects) {
		return 0, nil
	}
	if err != nil || !cached {
		return 0, err
	}
	n := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		to := filepath.Join(a.src, name)
		// The copy's time is now: not older than what it was made of.
		if err := copyFile(path, to); err != nil {
			return err
		}
		if strings.HasSuffix(name, ".o") {
			n++
		}
		return nil
	})
	return n, err
}

// keep remembers the objects of a finished build.
func (a *aid) keep(ctx context.Context) error {
	if !a.kept() {
		return nil // make asked again: it knew better, and nothing is sure
	}
	files, err := a.products()
	if err != nil || len(files) == 0 {
		return err
	}
	_, _, err = a.r.Cache.Tree(ctx, objectsKind, a.objectsKey(), func(_ context.Context, dir string) error {
		for _, name := range files {
			to := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
				return err
			}
			if err := copyFile(filepath.Join(a.src, name), to); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

// hidden returns, for each header of which a view shows only a part, the macros
// whose values it hides. A header that is more than plain definitions hides
// all, which no name stands for.
func (a *aid) hidden() (map[string][]string, error) {
	names := map[string][]string{}
	for header := range a.view.masked {
		if !strings.HasSuffix(header, ".h") {
			names[header] = nil
			continue
		}
		text, err := os.ReadFile(filepath.Join(a.r.Headers, header))
		if err != nil {
			return nil, err
		}
		if header == "include/generated/autoconf.h" {
			names[header] = []string{"CONFIG_BUILD_SALT", "BUILD_SALT"} // IS_ENABLED and its like
			continue
		}
		names[header] = []string{}
		for line := range strings.Lines(string(text)) {
			m := definition.FindStringSubmatch(line)
			if m == nil && strings.TrimSpace(line) != "" {
				names[header] = nil
				break
			}
			if m != nil {
				names[header] = append(names[header], m[1])
			}
		}
	}
	return names, nil
}

var definition = regexp.MustCompile(`^#define ([A-Za-z_][A-Za-z0-9_]*)(\s|$)`)

// reader finds out which words the files contain that objects are made of.
type reader struct {
	a      *aid
	hidden map[string][]string
	words  []string
	found  map[string]map[string]bool // by file
}

// sees reports whether something that a view hides may have gone into an
// object: it was made of a header that hides a macro, and another of its files
// names the macro, in whatever context.
func (r *reader) sees(c command) bool {
	wanted, files := []string{}, []string{}
	for _, dep := range append(slices.Clone(c.deps), "include/generated/autoconf.h") {
		inside := dep
		if !filepath.IsAbs(inside) {
			inside = filepath.Join(insideKernel, inside)
		}
		inside = filepath.Clean(inside)
		if rel, ok := strings.CutPrefix(inside, insideKernel+"/"); ok {
			if names, masked := r.hidden[rel]; masked && names == nil {
				return true
			} else if masked {
				wanted = append(wanted, names...)
				continue
			}
			files = append(files, filepath.Join(r.a.r.Headers, rel))
		} else if rel, ok := strings.CutPrefix(inside, insideSource+"/"); ok {
			files = append(files, filepath.Join(r.a.src, rel))
		} else if !strings.HasPrefix(inside, insideToolchain+"/") { // its digest is in the key
			return true // from where no key looks
		}
	}
	for _, file := range files {
		found := r.read(file)
		if found == nil || slices.ContainsFunc(wanted, func(name string) bool { return found[name] }) {
			return true
		}
	}
	return false
}

// read returns the words in a file, or nil where it cannot be read.
func (r *reader) read(file string) map[string]bool {
	found, known := r.found[file]
	if known {
		return found
	}
	if text, err := os.ReadFile(file); err == nil {
		found = map[string]bool{}
		for _, word := range r.words {
			found[word] = containsWord(text, word)
		}
	}
	r.found[file] = found
	return found
}

// containsWord reports whether the text has the word as a whole identifier.
func containsWord(text []byte, word string) bool {
	for from := 0; ; {
		i := bytes.Index(text[from:], []byte(word))
		if i < 0 {
			return false
		}
		begin := from + i
		end := begin + len(word)
		if (begin == 0 || !inIdentifier(text[begin-1])) && (end == len(text) || !inIdentifier(text[end])) {
			return true
		}
		from = begin + 1
	}
}

func inIdentifier(c byte) bool {
	return c == '_' || c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z'
}

// products lists the files worth keeping, by path below the sources.
func (a *aid) products() ([]string, error) {
	hidden, err := a.hidden()
	if err != nil {
		return nil, err
	}
	r := &reader{a: a, hidden: hidden, found: map[string]map[string]bool{}}
	for _, names := range hidden {
		r.words = append(r.words, names...)
	}
	var files []string
	err = filepath.WalkDir(a.src, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		object, ok := strings.CutSuffix(d.Name(), ".o.cmd")
		if !ok || !strings.HasPrefix(object, ".") || strings.HasSuffix(object, ".mod") {
			return nil
		}
		object = object[1:]
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		// What is linked, not compiled, has no such file.
		if c, ok := parseCommand(string(text)); !ok || r.sees(c) {
			return nil
		}
		rel, err := filepath.Rel(a.src, path)
		if err != nil {
			return err
		}
		object = filepath.Join(filepath.Dir(rel), object+".o")
		if info, err := os.Lstat(filepath.Join(a.src, object)); err != nil || !info.Mode().IsRegular() {
			return nil
		}
		files = append(files, rel, object)
		return nil
	})
	if err != nil || len(files) == 0 {
		return nil, err
	}
	// Headers that the driver's makefiles make; their rules have no inputs.
	for _, name := range []string{"nv_compiler.h"} {
		if info, err := os.Lstat(filepath.Join(a.src, name)); err == nil && info.Mode().IsRegular() {
			files = append(files, name)
		}
	}
	return files, nil
}

// command is what a .cmd file of kbuild says of an object.
type command struct {
	line string
	deps []string // the source first
}

var (
	commandLine = regexp.MustCompile(`^(?:saved)?cmd_\S+ := (.*)$`)
	sourceLine  = regexp.MustCompile(`^source_\S+ := (\S+)$`)
	depsLine    = regexp.MustCompile(`^deps_\S+ := \\$`)
	// Options by which a command reads what no list of dependencies names.
	unlisted = regexp.MustCompile(`(^|\s)(-fplugin\S*|@\S+|-specs\S*|-fprofile-use\S*|-fprofile-\S*use=\S*|-fsanitize-ignorelist\S*|-fsanitize-blacklist\S*)`)
)

const maxDeps = 20000

// parseCommand reads the .cmd file of a compiled object. It says no to any
// other, and to a command whose inputs are not all listed.
func parseCommand(text string) (command, bool) {
	var c command
	inDeps := false
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case inDeps:
			name, more := strings.CutSuffix(strings.TrimSpace(line), `\`)
			name = strings.TrimSpace(name)
			// $(wildcard include/config/X) names an option, which autoconf.h decides.
			if name != "" && !strings.HasPrefix(name, "$(wildcard ") {
				if strings.ContainsAny(name, " $") || len(c.deps) == maxDeps {
					return command{}, false
				}
				c.deps = append(c.deps, name)
			}
			inDeps = more
		case commandLine.MatchString(line):
			if c.line != "" {
				return command{}, false
			}
			c.line = commandLine.FindStringSubmatch(line)[1]
		case sourceLine.MatchString(line):
			c.deps = append(c.deps, sourceLine.FindStringSubmatch(line)[1])
		case depsLine.MatchString(line):
			inDeps = true
		}
	}
	if c.line == "" || len(c.deps) < 2 || inDeps || unlisted.MatchString(c.line) {
		return command{}, false
	}
	return c, true
}
