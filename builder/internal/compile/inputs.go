package compile

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/prebake/prebake/builder/internal/untrusted"
)

// fileFacts is what a file says that an object's key has to know.
type fileFacts struct {
	digest string
	named  map[string]bool // of the names that were looked for
	pastes map[string]bool // parts of names that the preprocessor puts together
	hides  bool            // it reads files that no list of dependencies names
}

// nameScanner looks for names in files, and reads each file once.
type nameScanner struct {
	names map[string]bool
	seen  map[string]*fileFacts
}

func newNameScanner(wanted map[string]bool) *nameScanner {
	return &nameScanner{names: wanted, seen: map[string]*fileFacts{}}
}

func (r *nameScanner) read(name string, text func() ([]byte, error)) *fileFacts {
	w, known := r.seen[name]
	if !known {
		if raw, err := text(); err == nil {
			w = r.parse(raw)
		}
		r.seen[name] = w
	}
	return w
}

var (
	pasted = regexp.MustCompile(`(\w*)\s*##\s*(\w*)`)
	// The assembler's and C23's ways to take a file in.
	takesIn = regexp.MustCompile(`\.incbin\b|#\s*embed\b`)
)

func (r *nameScanner) parse(text []byte) *fileFacts {
	sum := sha256.Sum256(text)
	w := &fileFacts{digest: hex.EncodeToString(sum[:]), named: map[string]bool{}, pastes: map[string]bool{},
		hides: takesIn.Match(text)}
	for i := 0; i < len(text); {
		if !inIdentifier(text[i]) {
			i++
			continue
		}
		begin := i
		for i < len(text) && inIdentifier(text[i]) {
			i++
		}
		if name := string(text[begin:i]); r.names[name] {
			w.named[name] = true
		}
	}
	if bytes.Contains(text, []byte("##")) {
		for _, m := range pasted.FindAllSubmatch(text, -1) {
			for _, part := range m[1:] {
				if len(part) > 2 { // shorter ones are parameters
					w.pastes[string(part)] = true
				}
			}
		}
	}
	return w
}

func inIdentifier(c byte) bool {
	return c == '_' || c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z'
}

// recorder finds out what the objects of a finished build were made of.
type recorder struct {
	*objects
	output  *untrusted.Dir
	hidden  map[string][]string
	driver  *nameScanner // of the driver's files, as the build left them
	headers *nameScanner // of the kernel's
}

func (k *recorder) readDriverFile(name string) *fileFacts {
	return k.driver.read(name, func() ([]byte, error) { return k.output.Read(name, maxSource) })
}

func (k *recorder) readHeader(name string) *fileFacts {
	return k.headers.read(name,
		func() ([]byte, error) { return readHost(filepath.Join(k.r.Headers, filepath.FromSlash(name))) })
}

// made returns what a command made its object of. It says no where something
// that a view hides may have gone in: the object was made of a header that hides
// a macro, and another of its files names the macro, in whatever context.
func (k *recorder) made(c command) (v variant, ok bool) {
	v = variant{Version: k.r.Driver.Modules().Version, Generated: map[string]string{}}
	var hidden []string
	var read []*fileFacts
	for _, dep := range append(slices.Clone(c.deps), "include/generated/autoconf.h") {
		inside := dep
		if !filepath.IsAbs(inside) {
			inside = filepath.Join(insideKernel, inside)
		}
		inside = filepath.Clean(inside)
		if rel, ok := strings.CutPrefix(inside, insideKernel+"/"); ok {
			if names, masked := k.hidden[rel]; masked && names == nil {
				return v, false
			} else if masked {
				hidden = append(hidden, names...)
				continue
			}
			w := k.readHeader(rel)
			if w == nil {
				return v, false
			}
			read = append(read, w)
			for name := range w.named {
				if k.tree.names[name] && !slices.Contains(v.Macros, name) {
					v.Macros = append(v.Macros, name)
				}
			}
		} else if rel, ok := strings.CutPrefix(inside, insideSource+"/"); ok {
			w := k.driverFile(&v, rel)
			if w == nil {
				return v, false
			}
			read = append(read, w)
		} else if !strings.HasPrefix(inside, insideToolchain+"/") { // its digest is in the key
			return v, false // from where no key looks
		}
	}
	for _, w := range read {
		if w.hides || slices.ContainsFunc(hidden, func(name string) bool { return w.named[name] }) {
			return v, false
		}
	}
	slices.Sort(v.Files)
	v.Files = slices.Compact(v.Files)
	slices.Sort(v.Macros)
	return v, true
}

// driverFile notes one of the driver's files: as it came, made by its makefiles,
// or one of conftest's, whose lines are looked up by name.
func (k *recorder) driverFile(v *variant, rel string) *fileFacts {
	w := k.readDriverFile(rel)
	if w == nil {
		return nil
	}
	if _, ok := k.answers[strings.TrimPrefix(rel, "conftest/")]; ok && strings.HasPrefix(rel, "conftest/") {
		return &fileFacts{}
	}
	if _, err := os.Lstat(filepath.Join(k.r.Source, filepath.FromSlash(rel))); err == nil {
		v.Files = append(v.Files, rel)
		return w
	}
	text, err := k.output.Read(rel, maxGenerated)
	if err != nil || strings.Contains(rel, "/") {
		return nil
	}
	v.Generated[rel] = string(text)
	return w
}

// hidden returns, for each header of which a view shows only a part, the macros
// whose values it hides. A header that is more than plain definitions hides
// all, which no name stands for.
func (o *objects) hidden() (map[string][]string, error) {
	names := map[string][]string{}
	for header := range o.view.masked {
		if !strings.HasSuffix(header, ".h") {
			names[header] = nil
			continue
		}
		if slices.Contains(volatileHeaders, header) {
			names[header] = []string{} // the compiler saw no more of it than a view shows
			continue
		}
		text, err := readHost(filepath.Join(o.r.Headers, header))
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
	unlisted = regexp.MustCompile(
		`(^|\s)(-fplugin\S*|@\S+|-specs\S*|-fprofile-use\S*|-fprofile-\S*use=\S*|-fsanitize-ignorelist\S*|-fsanitize-blacklist\S*)`)
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
