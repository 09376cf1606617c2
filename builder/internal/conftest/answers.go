package conftest

import (
	"encoding/json"
	"regexp"
	"strings"
)

// Basis has everything that decides the result of a test, except the script, the script's arguments and the test
// itself.
type Basis struct {
	// View is the digest of the kernel view (see the package comment). A running script may see only kernel files that
	// this digest covers.
	View string
	// Toolchain is the digest of the compiler's folder. Host is the digest of the host's programs ([sandbox.HostTools]).
	// Recipe is the version of the code that runs the script (Recipe in builder/internal/compile).
	Toolchain, Host, Recipe string
	// Macros is true if a kernel header contains a presence macro (NV_..._PRESENT) or NV_VERSION_STRING. Then a result
	// may depend on the whole of headers.h and on the driver's version.
	Macros bool
}

// Answers has the results of tests, by the test's key. [Keyer] returns the keys.
type Answers map[string]string

const maxAnswers = 1 << 20 // in bytes; pkg/cas stores no larger fact

// ReadAnswers parses the text of [Answers.Bytes]. If the text is not valid, ReadAnswers returns an empty map.
func ReadAnswers(raw []byte) Answers {
	s := Answers{}
	if json.Unmarshal(raw, &s) != nil || s == nil {
		return Answers{}
	}
	return s
}

// Bytes returns the results as text for [ReadAnswers], or nil if the text is too large to be stored.
func (s Answers) Bytes() []byte {
	raw, err := json.Marshal(s)
	if err != nil || len(raw) > maxAnswers {
		return nil
	}
	return raw
}

// Keyer computes the cache keys for the tests of one driver.
type Keyer struct {
	script *Script
	plan   *Plan
	basis  Basis
	flags  string
}

var (
	selfName    = regexp.MustCompile(`#conftest[0-9]+`)
	versionFlag = regexp.MustCompile(`(^| )-DNV_VERSION_STRING=\S+`)
	presence    = regexp.MustCompile(`\bNV_\w+_PRESENT\b`)
)

// NewKeyer returns a Keyer for the tests of a plan.
//
// [Keyer.Flags] and the keys leave out two parts of the compiler's flags, because they do not change a result:
//   - the script's process number, in the macro KBUILD_BASENAME,
//   - the driver's version, in the macro NV_VERSION_STRING. If the script contains this macro, or [Basis.Macros] is
//     true, the version stays.
func NewKeyer(s *Script, p *Plan, b Basis) *Keyer {
	a := &Keyer{script: s, plan: p, basis: b, flags: selfName.ReplaceAllString(p.Flags, "#conftest")}
	if !b.Macros && !s.contains("NV_VERSION_STRING") {
		a.flags = versionFlag.ReplaceAllString(a.flags, "")
	}
	return a
}

// Flags returns the compiler's flags. Every test must run with these flags.
func (a *Keyer) Flags() string { return a.flags }

// CacheKey returns the key of the cache entry with all results. Drivers with the same key share the entry.
func (a *Keyer) CacheKey() string {
	return digest("conftest sheet 4", a.basis.View, a.basis.Toolchain, a.basis.Host, a.basis.Recipe, a.plan.CC,
		a.plan.Arch, a.plan.Sources, a.plan.Output, a.flags, a.script.frame())
}

// HeaderKey returns the key of the test whether a header exists. "" stands for all headers in the script's own list.
func (a *Keyer) HeaderKey(header string) string { return digest("header", header) }

// TestKey returns the key of a compile test. Its second argument is the content of headers.h. If the script has no such
// test, TestKey returns false.
func (a *Keyer) TestKey(test, headers string) (string, bool) {
	text, ok := a.script.find(test)
	return digest("test", test, text, a.Visible(test, headers)), ok
}

// Visible returns the part of headers.h on which a test's program may depend: the lines about macros whose names occur
// in the test or in the script's common text. If [Basis.Macros] is true, it returns the whole of headers.h.
func (a *Keyer) Visible(test, headers string) string {
	if a.basis.Macros {
		return headers
	}
	text, _ := a.script.find(test)
	named := map[string]bool{}
	for _, part := range []string{text, a.script.frame()} {
		for _, m := range presence.FindAllString(part, -1) {
			named[m] = true
		}
	}
	var lines strings.Builder
	for line := range strings.Lines(headers) {
		if words := strings.Fields(line); len(words) > 1 && named[words[1]] {
			lines.WriteString(line)
		}
	}
	return lines.String()
}

// PatchesKey returns the key of the script's output for [ModePatches]. The key is valid only for a driver whose sources
// have no patch files.
func (a *Keyer) PatchesKey() string { return digest("patches") }
