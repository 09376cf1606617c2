package modcheck_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/btf"
	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/modcheck"
	"github.com/prebake/prebake/pkg/bzimage"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/program"
	"github.com/prebake/prebake/pkg/vm"
)

// typesOf extracts the kernel's BTF from the image in the boot folder into a file.
func typesOf(t *testing.T, in *cossrc.Inputs) string {
	t.Helper()
	image, err := os.ReadFile(filepath.Join(in.Boot, vm.BootKernel))
	if err != nil {
		t.Fatal(err)
	}
	linked, err := bzimage.Linked(image)
	if err != nil {
		t.Fatal(err)
	}
	data, err := btf.Read(bytes.NewReader(linked))
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "vmlinux.btf")
	if err := os.WriteFile(out, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return out
}

// realTypes loads modules with BTF into a real kernel. The kernel must refuse BTF that was made against a sibling
// kernel's BTF, and Check must refuse the same modules.
func realTypes(t *testing.T, own, other *cossrc.Inputs) {
	t.Helper()
	ownTypes, otherTypes := typesOf(t, own), typesOf(t, other)
	good, again, foreign := typedStandIn(t, own, "NOTHING", ownTypes), typedStandIn(t, own, "NOTHING",
		ownTypes), typedStandIn(t, own, "NOTHING", otherTypes)
	a, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(again); err != nil || !bytes.Equal(a, b) {
		t.Errorf("two compiles with BTF differ, %v", err)
	}
	k := facts(own)
	k.BTF = ownTypes
	if _, err := modcheck.Check(map[string]string{"nvidia": good}, k); err != nil {
		t.Errorf("Check = %v; want it to pass", err)
	}
	if _, err := modcheck.Check(map[string]string{"nvidia": foreign}, k); !fault.Is(err, fault.CheckFailed) ||
		!strings.Contains(err.Error(), "the module's types do not continue the kernel's types") {
		t.Errorf("Check with a sibling's types = %v; want check-failed for that reason", err)
	}

	const list = "/sys/kernel/btf"
	res, err := vm.Run(t.Context(), vm.Config{
		Boot: own.Boot, Init: program.Build(t, "pkg/vm/guestinit", string(target.AMD64)),
		Files: []vm.File{{Name: "/good.ko", Path: good}, {Name: "/foreign.ko", Path: foreign}},
		Steps: []vm.Step{
			{Argv: []string{"@insmod", "/good.ko"}}, {Name: "good", Argv: []string{"@ls", list}},
			{Argv: []string{"@rmmod", "nvidia"}},
			{Name: "load foreign", Argv: []string{"@insmod", "/foreign.ko"}, KeepGoing: true},
			{Name: "foreign", Argv: []string{"@ls", list}},
		}})
	if err != nil {
		t.Fatal(err)
	}
	said := map[string]vm.StepResult{}
	for _, s := range res.Steps {
		said[s.Name] = s
	}
	has := func(step string) bool { return strings.Contains(string(said[step].Stdout), " "+list+"/nvidia\n") }
	if !has("good") {
		t.Errorf("%s = %s; want the module's types there\n%s", list, said["good"].Stdout, res.KernelLog)
	}
	// If a module's BTF does not fit, a Debian kernel loads the module nevertheless, without the BTF.
	if log := said["load foreign"].KernelLog; has("foreign") ||
		!strings.Contains(log, "failed to validate module [nvidia] BTF") {
		t.Errorf("%s = %s; want a sibling's types refused\n%s", list, said["foreign"].Stdout, log)
	}
}
