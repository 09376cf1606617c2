// Package importrule checks rules about imports that the compiler does not enforce. Every rule needs a reason. Only
// test files import the package.
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

// belongsTo reports whether a package is the given one, or is below it. Nothing counts as below a package of the
// standard library, whose name has no dot.
func belongsTo(pkg, folder string) bool {
	return pkg == folder || strings.Contains(folder, ".") && strings.HasPrefix(pkg, folder+"/")
}

// CheckBanned fails the test if the program in the current folder links a banned package. The bans map packages to
// reasons.
func CheckBanned(t *testing.T, bans map[string]string) {
	t.Helper()
	for dep := range strings.FieldsSeq(list(t, "-deps", ".")) {
		for ban, why := range bans {
			if why == "" {
				t.Errorf("the ban of %s has no reason", ban)
			}
			if belongsTo(dep, ban) {
				t.Errorf("the program links %s: %s", dep, why)
			}
		}
	}
}

// Owner is a rule: only one package may import a heavy library.
type Owner struct {
	// Lib is the library. Package is the path of the package that may import it, below the current folder; "" means none.
	Lib, Package string
	Reason       string
}

// CheckOwners fails the test if a package below the current folder imports a library that another package owns. own is
// the import path of the current folder.
func CheckOwners(t *testing.T, own string, homes []Owner) {
	t.Helper()
	for line := range strings.Lines(list(t, "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...")) {
		fields := strings.Fields(line)
		for _, h := range homes {
			for _, imported := range fields[1:] {
				if belongsTo(imported, h.Lib) && (h.Package == "" || fields[0] != own+h.Package) {
					t.Errorf("%s imports %s: %s", fields[0], imported, h.Reason)
				}
			}
		}
	}
}
