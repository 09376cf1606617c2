// Package importrule tests import rules that the compiler does not enforce. Only test files import it, in the folder of
// the program that they are about. It refuses to give a ban without a reason.
package importrule

import (
	"os/exec"
	"strings"
	"testing"
)

func list(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", append([]string{"list"}, args...)...).Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	return string(out)
}

// within reports whether a package is one of a module or folder. Of the
// standard library, a package is itself only.
func within(pkg, folder string) bool {
	return pkg == folder || strings.Contains(folder, ".") && strings.HasPrefix(pkg, folder+"/")
}

// CheckBanned fails when the program in this folder links a package that is a key of
// bans; the value says why it must not.
func CheckBanned(t *testing.T, bans map[string]string) {
	t.Helper()
	for dep := range strings.FieldsSeq(list(t, "-deps", ".")) {
		for ban, why := range bans {
			if why == "" {
				t.Errorf("the ban of %s has no reason", ban)
			}
			if within(dep, ban) {
				t.Errorf("the program links %s: %s", dep, why)
			}
		}
	}
}

// Owner is where a heavy library lives.
type Owner struct {
	// Lib is the library, and Package the one below this folder that may import
	// it, such as /internal/store; "" means none.
	Lib, Package string
	Reason       string
}

// CheckOwners fails when a package below this folder, whose import path is own,
// imports a library that lives elsewhere.
func CheckOwners(t *testing.T, own string, homes []Owner) {
	t.Helper()
	for line := range strings.Lines(list(t, "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...")) {
		fields := strings.Fields(line)
		for _, h := range homes {
			for _, imported := range fields[1:] {
				if within(imported, h.Lib) && (h.Package == "" || fields[0] != own+h.Package) {
					t.Errorf("%s imports %s: %s", fields[0], imported, h.Reason)
				}
			}
		}
	}
}
