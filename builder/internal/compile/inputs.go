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

// fileFacts are the facts about one file that the key of an object needs.
type fileFacts struct {
	digest string
	named  map[string]bool // the scanner's names that occur in the file
	pastes map[string]bool // parts of names, which the preprocessor joins with ##
	hides  bool            // true if the file includes files that are missing in every dependency list
	asks   bool            // true if the file tests whether some file exists
}

// nameScanner looks for names in files. It reads each file once.
type nameScanner struct {
	names map[string]bool // the names to look for
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
	// Directives of the assembler and of C23 that include a binary file.
	takesIn = regexp.MustCompile(`\.incbin\b|#\s*embed\b`)
	// Operators of the preprocessor whose values depend on files that are in no dependency list.
	asksFor = regexp.MustCompile(`\b__has_(?:include|embed)`)
)

func (r *nameScanner) parse(text []byte) *fileFacts {
	sum := sha256.Sum256(text)
	w := &fileFacts{digest: hex.EncodeToString(sum[:]), named: map[string]bool{}, pastes: map[string]bool{},
		hides: takesIn.Match(text), asks: asksFor.Match(text)}
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
				if len(part) > 2 { // shorter parts are names of macro parameters
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

// recorder finds the inputs of the objects that a finished build made, and stores the objects.
type recorder struct {
	*objects
	output  *untrusted.Dir
	hidden  map[string][]string // the result of objects.hiddenMacros
	driver  *nameScanner        // the driver's files after the build
	headers *nameScanner        // the kernel's headers
}

func (k *recorder) readDriverFile(name string) *fileFacts {
	return k.driver.read(name, func() ([]byte, error) { return k.output.Read(name, maxSource) })
}

func (k *recorder) readHeader(name string) *fileFacts {
	return k.headers.read(name,
		func() ([]byte, error) { return readHost(filepath.Join(k.r.Headers, filepath.FromSlash(name))) })
}

// inputsOf returns the inputs of the object that the given command compiled. If ok is false, the cache must not keep
// the object, because its inputs are not all known. For example, the object includes the header of a hidden macro, such
// as UTS_RELEASE, and another of its files contains the macro's name.
func (k *recorder) inputsOf(c command) (v variant, ok bool) {
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
			if w == nil || w.asks {
				return v, false
			}
			read = append(read, w)
		} else if !strings.HasPrefix(inside, insideToolchain+"/") { // the toolchain's digest is in the key already
			return v, false // the file is outside all folders whose digests are in the key
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

// driverFile adds one of the driver's files to the variant and returns the file's facts. It returns nil if the file
// cannot be an input. It does not add a header with results of conftest's tests, because only some lines of the header
// are inputs (see answersAbout).
func (k *recorder) driverFile(v *variant, rel string) *fileFacts {
	w := k.readDriverFile(rel)
	if w == nil {
		return nil
	}
	if name, ok := strings.CutPrefix(rel, "conftest/"); ok && isAnswerHeader(name) {
		if _, ok := k.answers[name]; ok {
			return &fileFacts{}
		}
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

// hiddenMacros returns the macros whose values a view hides, by header. A nil list means that the view hides more of
// this header than the values of macros. The cache keeps no object that includes a header with a nil list.
func (o *objects) hiddenMacros() (map[string][]string, error) {
	names := map[string][]string{}
	for header := range o.view.masked {
		if !strings.HasSuffix(header, ".h") {
			names[header] = nil
			continue
		}
		if slices.Contains(volatileHeaders, header) {
			names[header] = []string{} // `make`'s sandbox hides the same values
			continue
		}
		text, err := readHost(filepath.Join(o.r.Headers, header))
		if err != nil {
			return nil, err
		}
		if header == "include/generated/autoconf.h" {
			// A macro may build the name CONFIG_BUILD_SALT out of CONFIG_ and the shorter name.
			names[header] = []string{"CONFIG_BUILD_SALT", "BUILD_SALT"}
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

// command is the content of kbuild's .cmd file for one object.
type command struct {
	line string
	deps []string // dependencies; the source file comes first
}

var (
	commandLine = regexp.MustCompile(`^(?:saved)?cmd_\S+ := (.*)$`)
	sourceLine  = regexp.MustCompile(`^source_\S+ := (\S+)$`)
	depsLine    = regexp.MustCompile(`^deps_\S+ := \\$`)
	// Compiler options that read a file without listing it as a dependency.
	unlisted = regexp.MustCompile(
		`(^|\s)(-fplugin\S*|@\S+|-specs\S*|-fprofile-use\S*|-fprofile-\S*use=\S*|-fsanitize-ignorelist\S*|-fsanitize-blacklist\S*)`)
)

const maxDeps = 20000

// parseCommand reads the .cmd file of a compiled object. It returns false for any other .cmd file, and for a command
// that may read unlisted files.
func parseCommand(text string) (command, bool) {
	var c command
	inDeps := false
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case inDeps:
			name, more := strings.CutSuffix(strings.TrimSpace(line), `\`)
			name = strings.TrimSpace(name)
			// $(wildcard include/config/X) stands for a kernel option. The options are in autoconf.h, which inputsOf always
			// adds.
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
