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

// Policy describes how the running kernel restricts the loading of modules.
type Policy struct {
	// SignaturesEnforced means that the kernel loads only modules that its own keys signed.
	SignaturesEnforced bool `json:"signaturesEnforced"`
	// LoadPin means that the LoadPin security module is active and enforcing.
	LoadPin bool `json:"loadPin"`
	// Lockdown is the kernel's lockdown mode: integrity or confidentiality. Both forbid unsigned modules. "" means none or
	// unknown.
	Lockdown string `json:"lockdown,omitempty"`
	// LoadPinExcludes are the kinds of files that LoadPin does not check.
	LoadPinExcludes []string `json:"loadPinExcludes,omitempty"`
}

// readPolicy reads the kernel command line and the state that the kernel reports. The reported state takes precedence.
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
	// The text is like "none [integrity] confidentiality" (security/lockdown/lockdown.c). Without securityfs there is no
	// file.
	if text, err := readOptional(root, "sys/kernel/security/lockdown"); err == nil {
		_, now, _ := strings.Cut(text, "[")
		if now, _, ok := strings.Cut(now, "]"); ok && now != "none" {
			p.Lockdown = now
		}
	}
	// The sysctl exists only if LoadPin was enabled at boot. Linux 5.8 renamed it from "enabled" to "enforce".
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

// ParseCmdline parses a kernel command line. The last occurrence of a key counts.
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

// Restricts reports which of two restrictions are in force: enforced signatures, and a LoadPin that allows modules from
// the root file system only. The boot configuration can lift both.
func (p Policy) Restricts() (signatures, place bool) {
	return p.SignaturesEnforced, p.LoadPin && !slices.Contains(p.LoadPinExcludes, "kernel-module")
}

// PolicyError means that the kernel would refuse a module because of its boot configuration.
type PolicyError struct{ text string }

func (e *PolicyError) Error() string { return e.text }

func refused(text, hint string) error {
	return fault.Wrap(fault.Rejected, &PolicyError{text}, hint)
}

// Allows returns the reason why the kernel would refuse a module from the install folder, or nil. Only the kernel can
// check the key of a signed module.
func (p Policy) Allows(module string, signed bool) error {
	if p.SignaturesEnforced && !signed {
		return refused(
			fmt.Sprintf("load module %s: the kernel enforces module signatures (module.sig_enforce=1), and this module has none",
				module),
			"boot the node with module.sig_enforce=0 on the kernel command line (--edit-boot does that), or use a GKE GPU "+
				"node pool, whose nodes load any module")
	}
	if p.Lockdown != "" && !signed {
		return refused(
			fmt.Sprintf("load module %s: the kernel is locked down (%s) and this module has no signature", module, p.Lockdown),
			"boot the node without Secure Boot and without lockdown= on the kernel command line, or sign the modules with a "+
				"key that the kernel trusts")
	}
	if p.LoadPin && !slices.Contains(p.LoadPinExcludes, "kernel-module") {
		return refused(
			fmt.Sprintf("load module %s: LoadPin allows only modules from the root filesystem", module),
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
		return "", fmt.Errorf("read %s: the file has more than %d bytes", name, maxFile)
	}
	return string(b), nil
}
