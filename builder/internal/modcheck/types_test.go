package modcheck

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/btfsample"
)

// TestTypes checks that Check accepts a module's BTF only if its type numbers begin after those of the kernel's BTF.
func TestTypes(t *testing.T) {
	t.Parallel()
	own, other := []string{"int", "task_struct"}, []string{"int", "task_struct", "file"}
	with := func(kernel []string) []string { return []string{".BTF", string(btfsample.Module(kernel, "nv_state"))} }
	for _, row := range []struct {
		name   string
		kernel string
		module []string
		want   string // "" means that Check must pass
	}{
		{"none", "", nil, ""},
		{"own kernel's", string(btfsample.Kernel(own...)), with(own), ""},
		{"another kernel's", string(btfsample.Kernel(own...)), with(other),
			"nvidia: the module's types do not continue the kernel's types: check type 5: the name at offset"},
		{"missing", string(btfsample.Kernel(own...)), nil, "nvidia: read the module's BTF: the file has no section .BTF"},
		{"unasked", "", with(own), "nvidia: the module has BTF, but the kernel's BTF is missing"},
		{"damaged", string(btfsample.Kernel(own...)), []string{".BTF", "types"}, "does not have BTF of version 1"},
	} {
		k := kernel(t)
		if row.kernel != "" {
			k.BTF = filepath.Join(k.Headers, "vmlinux.btf")
			write(t, k.BTF, []byte(row.kernel))
		}
		path := stampFile(t, module(magic, row.module...), ours)
		_, err := Check(map[string]string{"nvidia": path}, k)
		if row.want == "" && err != nil {
			t.Errorf("%s: Check = %v; want it to pass", row.name, err)
		}
		if row.want != "" && (!fault.Is(err, fault.CheckFailed) || fault.Hint(err) == "" ||
			!strings.Contains(err.Error(), row.want)) {
			t.Errorf("%s: Check = %v; want check-failed with %q and a hint", row.name, err, row.want)
		}
	}
	k := kernel(t)
	typed := map[string]string{"nvidia": stampFile(t, module(magic, with(own)...), ours)}
	k.Fingerprint = ""
	if _, err := Check(typed, k); err != nil {
		t.Errorf("Check of somebody else's module with BTF = %v; want it to pass", err)
	}
	k.BTF = filepath.Join(k.Headers, "vmlinux.btf")
	write(t, k.BTF, []byte("types"))
	if _, err := Check(map[string]string{"nvidia": stampFile(t, module(magic), ours)}, k); err == nil ||
		!strings.Contains(err.Error(), "read the kernel's BTF") {
		t.Errorf("Check with damaged BTF of the kernel = %v; want an error about the kernel's BTF", err)
	}
}
