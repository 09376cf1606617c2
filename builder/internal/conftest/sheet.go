package conftest

import (
	"encoding/json"
	"regexp"
	"strings"
)

// Basis is what decides every answer of a sheet besides the question itself.
type Basis struct {
	// View is the digest of the header tree as the script sees it: nothing that
	// it does not cover may be visible while an answer is found.
	View string
	// Toolchain is the digest of the compiler's folder, Recipe the way that
	// the script is run.
	Toolchain, Recipe string
	// Macros says that some header speaks of presence macros or of the driver's
	// version by name; then no question may be taken out of its context.
	Macros bool
}

// Sheet holds answers by key. The zero value is empty.
type Sheet map[string]string

const maxSheet = 1 << 20 // a fact's bound in pkg/cas

// ReadSheet returns a stored sheet; a strange one is empty.
func ReadSheet(raw []byte) Sheet {
	s := Sheet{}
	if json.Unmarshal(raw, &s) != nil || s == nil {
		return Sheet{}
	}
	return s
}

// Bytes is the sheet as ReadSheet takes it, or nil when it has grown too large
// to be kept.
func (s Sheet) Bytes() []byte {
	raw, err := json.Marshal(s)
	if err != nil || len(raw) > maxSheet {
		return nil
	}
	return raw
}

// Asker makes keys for one driver's questions.
type Asker struct {
	script *Script
	plan   *Plan
	basis  Basis
	flags  string // those that count for every question
	loose  bool   // -fms-extensions is given, and counts for some questions only
}

var (
	selfName    = regexp.MustCompile(`#conftest[0-9]+`)
	versionFlag = regexp.MustCompile(`(^| )-DNV_VERSION_STRING=\S+`)
	msFlag      = regexp.MustCompile(`(^| )-fms-extensions( |$)`)
	unnamed     = regexp.MustCompile(`\b(struct|union)\s+\w+\s*;`)
	presence    = regexp.MustCompile(`\bNV_\w+_PRESENT\b`)
)

// NewAsker prepares keys for the questions of a plan.
//
// Three things on the command line do not count. The script's process number,
// which it puts into KBUILD_BASENAME. The driver's version, where neither the
// script nor a header names its macro. And gcc's -fms-extensions, which newer
// drivers add: all that it changes in C is to accept a struct's member that is
// a tagged struct without a name. The kernel's headers are written to be
// compiled without it, since the kernel's own flags lack it, so it can count
// only for a question whose own text has such a member.
func NewAsker(s *Script, p *Plan, b Basis) *Asker {
	a := &Asker{script: s, plan: p, basis: b, flags: selfName.ReplaceAllString(p.Flags, "#conftest")}
	if !b.Macros && !strings.Contains(string(s.text), "NV_VERSION_STRING") {
		a.flags = versionFlag.ReplaceAllString(a.flags, "")
	}
	gcc := strings.Contains(p.CC, "gcc")
	if gcc && len(msFlag.FindAllString(a.flags, -1)) == 1 && strings.HasSuffix(a.flags, " -fms-extensions") {
		a.flags, a.loose = strings.TrimSuffix(a.flags, " -fms-extensions"), true
	}
	return a
}

// SheetKey names the sheet that holds the answers.
func (a *Asker) SheetKey() string {
	return digest("conftest sheet 1", a.basis.View, a.basis.Toolchain, a.basis.Recipe, a.plan.CC, a.plan.Arch, a.plan.Sources, a.plan.Output, a.flags, a.script.rest)
}

// HeaderKey is the key of the question whether a header is there.
func (a *Asker) HeaderKey(header string) string {
	return a.key("header", header, "")
}

// TestKey is the key of a compile test, once headers.h is known: a program sees
// of it only the macros that its text names.
func (a *Asker) TestKey(test, headers string) (string, bool) {
	text, ok := a.script.find(test)
	if !ok {
		return "", false
	}
	seen := headers
	if !a.basis.Macros {
		named := map[string]bool{}
		for _, part := range []string{text, a.script.rest} {
			for _, m := range presence.FindAllString(part, -1) {
				named[m] = true
			}
		}
		var lines []string
		for line := range strings.Lines(headers) {
			if words := strings.Fields(line); len(words) > 1 && named[words[1]] {
				lines = append(lines, line)
			}
		}
		seen = strings.Join(lines, "")
	}
	return a.key("test", test, text+seen), true
}

func (a *Asker) key(kind, name, text string) string {
	ms := ""
	if a.loose && unnamed.MatchString(text) {
		ms = "-fms-extensions"
	}
	return digest(kind, name, text, ms)
}

// PatchesKey is the key of what patch_check prints for sources without patches.
func (a *Asker) PatchesKey() string { return digest("patches") }
