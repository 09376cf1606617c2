package modsign_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/pkg/testkit/program"
	"github.com/prebake/prebake/pkg/vm"
)

// TestLive loads variants of a module into a real kernel that accepts only signed modules. The module comes from the
// boot folder PREBAKE_BOOT. If the module is signed there, the kernel must accept it unchanged. The kernel must refuse
// all other variants. No variant here has a new signature that the kernel accepts; the tests of deploy/internal/mirror
// load such a module (make clang).
func TestLive(t *testing.T) {
	t.Parallel()
	boot := os.Getenv("PREBAKE_BOOT")
	if boot == "" {
		t.Skip("PREBAKE_BOOT is not set: want the path of a boot folder, with vmlinuz and modules")
	}
	init := program.Build(t, "pkg/vm/guestinit", "")
	// bare is a boot folder with the kernel alone, because the steps below load the modules.
	bare := t.TempDir()
	kernel, err := filepath.Abs(filepath.Join(boot, vm.BootKernel))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(kernel, filepath.Join(bare, vm.BootKernel)); err != nil {
		t.Fatal(err)
	}
	unsigned, asShipped := plainModule(t, boot)
	c := vm.Config{Boot: bare, Init: init, Timeout: 3 * time.Minute, KernelArgs: []string{"module.sig_enforce=1"}}
	type expectation struct {
		name  string
		errno syscall.Errno
		line  string // a part of the kernel's log
	}
	var want []expectation
	try := func(name string, data []byte, errno syscall.Errno, line string) {
		file := "/" + strings.ReplaceAll(name, " ", "-") + ".ko"
		c.Files = append(c.Files, vm.File{Name: file, Data: data, Mode: 0o644})
		c.Steps = append(c.Steps, vm.Step{Name: name, Argv: []string{"@insmod", file}, KeepGoing: true, Timeout: time.Minute})
		want = append(want, expectation{name, errno, line})
	}
	try("unsigned", unsigned, syscall.EKEYREJECTED, "unsigned module is rejected")
	try("signed with a key that the kernel does not know", signModule(t, load(t, rsaPair(t)), unsigned, "sha256"),
		syscall.EKEYREJECTED, "module with unavailable key is rejected")
	broken := signModule(t, load(t, rsaPair(t)), unsigned, "sha256")
	// The first byte of the trailer must be 0. Like the kernel, Split refuses other values.
	broken[len(broken)-len("~Module signature appended~\n")-12] = 1
	try("signed with a broken trailer", broken, syscall.EBADMSG, "unexpected non-zero params")
	if asShipped != nil {
		try("signed by whoever built the kernel", asShipped, 0, "")
		// Verify must be able to read the signature of a real kernel build, even if it trusts no key.
		if _, err := modsign.Verify(asShipped, nil); !errors.Is(err, modsign.ErrUnknownKey) {
			t.Errorf("Verify(as shipped, nobody trusted) = %v; want an unknown key", err)
		}
	}
	res, err := vm.Run(t.Context(), c)
	if err != nil {
		t.Fatalf("Run() = %v", err)
	}
	for _, w := range want {
		s, ok := res.Step(w.name)
		if !ok || syscall.Errno(s.ExitCode) != w.errno || !strings.Contains(s.KernelLog, w.line) {
			t.Errorf("insmod of a module %s = %d (%s); want %d, %q\n%s", w.name, s.ExitCode, s.Error, w.errno, w.line,
				s.KernelLog)
		}
	}
}

// moduleName is a module of the kernel. The test uses it in place of a driver, because it depends on no other module.
const moduleName = "failover"

// plainModule returns the boot folder's module without its signature. If the module has a signature, asShipped is the
// unchanged module.
func plainModule(t *testing.T, boot string) (unsigned, asShipped []byte) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(boot, "modules", moduleName+".ko"))
	if err != nil {
		t.Fatalf("no module to try: %v", err)
	}
	body, signature, err := modsign.Split(data)
	if err != nil {
		t.Fatal(err)
	}
	if signature != nil {
		asShipped = data
	}
	return body, asShipped
}
