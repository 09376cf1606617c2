package host

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Policy is how the running kernel restricts the loading of modules.
type Policy struct {
	// SignaturesEnforced says that only modules signed by a key of the kernel's load.
	SignaturesEnforced bool `json:"signaturesEnforced"`
	// LoadPin says that the LoadPin security module is active and enforcing.
	LoadPin bool `json:"loadPin"`
	// Lockdown is how far the kernel is locked down, integrity or confidentiality: it loads no
	// module without a signature then. "" is not at all, or not told.
	Lockdown string `json:"lockdown,omitempty"`
	// LoadPinExcludes are the kinds of file that LoadPin leaves alone.
	LoadPinExcludes []string `json:"loadPinExcludes,omitempty"`
}

// readPolicy joins what was asked for on the kernel's command line with what
// the kernel says it does; what the kernel reports counts, if it reports it.
func readPolicy(root fs.FS) (Policy, error) {
	text, err := readOptional(root, "proc/cmdline")
	if err != nil {
		return Policy{}, fmt.Errorf("read kernel command line: %w", err)
	}
	p := ParseCmdline(text)
	enforced, err := readOptional(root, "sys/module/module/parameters/sig_enforce")
	if err != nil {
		return Policy{}, fmt.Errorf("read module signature policy: %w", err)
	}
	if enforced != "" {
		p.SignaturesEnforced = enforced == "Y"
	}
	// As in "none [integrity] confidentiality" (security/lockdown/lockdown.c). The file is
	// there where securityfs is mounted, which it need not be.
	if text, err := readOptional(root, "sys/kernel/security/lockdown"); err == nil {
		_, now, _ := strings.Cut(text, "[")
		if now, _, ok := strings.Cut(now, "]"); ok && now != "none" {
			p.Lockdown = now
		}
	}
	// The sysctl exists only where LoadPin is built in and chosen at boot; its
	// name changed from "enabled" to "enforce" in Linux 5.8.
	p.LoadPin = false
	for _, name := range []string{"enforce", "enabled"} {
		v, err := readOptional(root, "proc/sys/kernel/loadpin/"+name)
		if err != nil {
			return Policy{}, fmt.Errorf("read LoadPin policy: %w", err)
		}
		p.LoadPin = p.LoadPin || v == "1"
	}
	return p, nil
}

// ParseCmdline reads what a kernel command line asks for. Later words win.
func ParseCmdline(text string) Policy {
	p := Policy{}
	for word := range strings.FieldsSeq(text) {
		key, value, hasValue := strings.Cut(word, "=")
		on := !hasValue || value == "1" || value == "Y" || value == "y"
		switch key {
		case "module.sig_enforce":
			p.SignaturesEnforced = on
		case "loadpin.enforce", "loadpin.enabled":
			p.LoadPin = on
		case "loadpin.exclude":
			p.LoadPinExcludes = strings.Split(value, ",")
		}
	}
	return p
}

// Restricts reports whether the kernel holds back modules for what its command line says.
func (p Policy) Restricts() (signatures, place bool) {
	return p.SignaturesEnforced, p.LoadPin && !slices.Contains(p.LoadPinExcludes, "kernel-module")
}

// PolicyError is that the kernel is bound to refuse modules for what it was told at boot.
type PolicyError struct{ text string }

func (e *PolicyError) Error() string { return e.text }

func refused(text, hint string) error {
	return fault.Wrap(fault.Rejected, &PolicyError{text}, hint)
}

// Allows returns why the kernel is bound to refuse a module of ours, or nil.
// signed says whether the module carries a signature at all; whose it is, only
// the kernel can tell.
func (p Policy) Allows(module string, signed bool) error {
	if p.SignaturesEnforced && !signed {
		return refused(
			fmt.Sprintf("load %s: the kernel enforces module signatures (module.sig_enforce=1) and this module has none",
				module),
			"boot the node with module.sig_enforce=0 on the kernel command line (--edit-boot does that), or use a GKE GPU "+
				"node pool, whose nodes load any module")
	}
	if p.Lockdown != "" && !signed {
		return refused(
			fmt.Sprintf("load %s: the kernel is locked down (%s) and this module has no signature", module, p.Lockdown),
			"boot the node without Secure Boot and without lockdown= on the kernel command line, or have the modules signed")
	}
	if p.LoadPin && !slices.Contains(p.LoadPinExcludes, "kernel-module") {
		return refused(
			fmt.Sprintf("load %s: LoadPin lets only modules of the root filesystem load", module),
			"boot the node with loadpin.exclude=kernel-module,firmware on the kernel command line (--edit-boot does that)")
	}
	return nil
}

// readBounded reads a small text file.
func readBounded(root fs.FS, name string) (text string, err error) {
	f, err := root.Open(name)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return "", err
	}
	if len(b) > maxFile {
		return "", fmt.Errorf("read %s: larger than %d bytes", name, maxFile)
	}
	return string(b), nil
}
