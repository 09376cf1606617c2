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
	"strings"
)

// Objects are kept as one tree for each driver and view: what make left for
// every source file, which is the object and the .cmd file that make compares
// with what it would do. make stays the judge: a command or a time that does
// not fit has the file compiled again.
//
// An object is kept only if nothing that a view hides went into it. Its .cmd
// file lists what was read, so that is known, not assumed. The .mod.c files,
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

// products lists the files worth keeping, by path below the sources.
func (a *aid) products() ([]string, error) {
	hidden := map[string]bool{}
	for name := range a.view.masked {
		// autoconf.h is in every command; only the salt in it is hidden, and
		// who reads that names it.
		if name != "include/generated/autoconf.h" {
			hidden[name] = true
		}
	}
	salted := map[string]bool{} // by dependency
	var files []string
	err := filepath.WalkDir(a.src, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		object, ok := strings.CutSuffix(d.Name(), ".o.cmd")
		if object, ok = strings.CutPrefix(object, "."); !ok || object == "" || strings.HasSuffix(object, ".mod") || d.Name() == object {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		cmd, ok := parseCommand(string(text))
		if !ok {
			return nil // linked, not compiled
		}
		for _, dep := range cmd.deps {
			inside := dep
			if !filepath.IsAbs(inside) {
				inside = filepath.Join(insideKernel, inside)
			}
			inside = filepath.Clean(inside)
			var host string
			if rel, ok := strings.CutPrefix(inside, insideKernel+"/"); ok {
				if hidden[rel] {
					return nil
				}
				host = filepath.Join(a.r.Headers, rel)
			} else if rel, ok := strings.CutPrefix(inside, insideSource+"/"); ok {
				host = filepath.Join(a.src, rel)
			} else if strings.HasPrefix(inside, insideToolchain+"/") {
				continue // the toolchain's digest is in the key
			} else {
				return nil // from where no key looks
			}
			bad, seen := salted[host]
			if !seen {
				text, err := os.ReadFile(host)
				bad = err != nil || bytes.Contains(text, []byte("BUILD_SALT")) && !strings.HasSuffix(host, "include/generated/autoconf.h")
				salted[host] = bad
			}
			if bad {
				return nil
			}
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
