package conftest

import (
	"encoding/json"
	"regexp"
	"strings"
)

// Basis is what decides every stored answer besides the question itself.
type Basis struct {
	// View is the digest of the header tree as the script sees it: nothing that
	// it does not cover may be visible while an answer is found.
	View string
	// Toolchain is the digest of the compiler's folder, Host that of the host's
	// programs ([sandbox.HostTools]), Recipe the way that
	// the script is run.
	Toolchain, Host, Recipe string
	// Macros says that some header mentions presence macros or of the driver's
	// version by name; then no question may be taken out of its context.
	Macros bool
}

// Answers holds answers by key. The zero value is empty.
type Answers map[string]string

const maxAnswers = 1 << 20 // a fact's bound in pkg/cas

// ReadAnswers returns stored answers; what cannot be read is empty.
func ReadAnswers(raw []byte) Answers {
	s := Answers{}
	if json.Unmarshal(raw, &s) != nil || s == nil {
		return Answers{}
	}
	return s
}

// Bytes is what ReadAnswers takes, or nil when it has grown too large
// to be kept.
func (s Answers) Bytes() []byte {
	raw, err := json.Marshal(s)
	if err != nil || len(raw) > maxAnswers {
		return nil
	}
	return raw
}

// Keyer makes keys for one driver's questions.
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

// NewKeyer prepares keys for the questions of a plan.
//
// Two things on the command line do not count, and [Keyer.Flags] leaves them
// out, so that no program sees them: the script's process number, which it puts
// into KBUILD_BASENAME, and the driver's version, where neither the script nor a
// header names its macro.
func NewKeyer(s *Script, p *Plan, b Basis) *Keyer {
	a := &Keyer{script: s, plan: p, basis: b, flags: selfName.ReplaceAllString(p.Flags, "#conftest")}
	if !b.Macros && !s.names("NV_VERSION_STRING") {
		a.flags = versionFlag.ReplaceAllString(a.flags, "")
	}
	return a
}

// Flags are the compiler's flags that every question is to be asked with.
func (a *Keyer) Flags() string { return a.flags }

// CacheKey is the key of the stored answers.
func (a *Keyer) CacheKey() string {
	return digest("conftest sheet 3", a.basis.View, a.basis.Toolchain, a.basis.Host, a.basis.Recipe, a.plan.CC,
		a.plan.Arch, a.plan.Sources, a.plan.Output, a.flags, a.script.frame())
}

// HeaderKey is the key of the question whether a header is there; "" stands for
// all headers that a script knows by itself.
func (a *Keyer) HeaderKey(header string) string { return digest("header", header) }

// TestKey is the key of a compile test, once headers.h is known.
func (a *Keyer) TestKey(test, headers string) (string, bool) {
	text, ok := a.script.find(test)
	return digest("test", test, text, a.Visible(test, headers)), ok
}

// Visible is the part of headers.h that a test's program may see: the lines about
// macros that its text names. All of it, where a header of the kernel names one.
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

// PatchesKey is the key of what patch_check prints for sources without patches.
func (a *Keyer) PatchesKey() string { return digest("patches") }
