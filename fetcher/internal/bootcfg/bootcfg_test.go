package bootcfg_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/bootcfg"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/pkg/fault"
)

// These are the words of real command lines up to cros_efi. Sources: the test file of Google's image analyzer
// (cos/tools, image1, COS 81), and /proc/cmdline of Cloud Shell's hosts (COS with 6.6.105+, September 2025).
const (
	words81 = "init=/usr/lib/systemd/systemd boot=local rootwait ro noresume noswap loglevel=7 noinitrd console=ttyS0 " +
		"security=apparmor csm.disabled=1  dm_verity.error_behavior=3       i915.modeset=1 cros_efi"
	words121 = "init=/usr/lib/systemd/systemd rootwait ro noresume loglevel=7 console=tty1 console=ttyS0,115200 " +
		"security=apparmor csm.disabled=1 loadpin.exclude=kernel-module,firmware modules-load=loadpin_trigger " +
		"firmware_class.path=/var/lib/nvidia/firmware module.sig_enforce=1 i915.modeset=1 cros_efi"
	wordsOld = "init=/usr/lib/systemd/systemd ro loadpin.exclude=kernel-module modules-load=loadpin_trigger " +
		"module.sig_enforce=1 cros_efi"
	verity = `root=/dev/dm-0 dm="1 vroot none ro 1,0 2539520 verity payload=PARTUUID=E5822204-E5B9-2848-8A90-37790091EA3E module.sig_enforce=1 hashstart=2539520"`
)

// config returns a boot configuration with the entries of COS: two local, two verified, and one for USB.
func config(words string) string {
	var b strings.Builder
	b.WriteString("defaultA=2\ndefaultB=3\ngptpriority $grubdisk 2 prioA\n\nif [ $prioA -lt $prioB ]; then\n  set " +
		"default=$defaultB\nfi\nset timeout=0\n# linux is no entry here\n")
	for _, kind := range []string{"local", "verified"} {
		for _, side := range []string{"A", "B"} {
			root := "      root=PARTUUID=E5822204-E5B9-2848-8A90-37790091EA3E"
			if kind == "verified" {
				root = " " + verity
			}
			fmt.Fprintf(&b, "\nmenuentry %q {\n  linux /syslinux/vmlinuz.%s %s%s\n}\n", kind+" image "+side, side, words, root)
		}
	}
	fmt.Fprintf(&b, "\nmenuentry \"Alternate USB Boot\" {\n  linux (hd0,3)/boot/vmlinuz %s\n}\n", words)
	return b.String()
}

func TestEdit(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		words string
		want  bootcfg.Want
		edits []string // pairs of old and new text, which each entry must have before and after the edit
	}{
		"signatures": {words121, bootcfg.Want{Unsigned: true},
			[]string{" module.sig_enforce=1 i915", " module.sig_enforce=0 i915"}},
		"LoadPin, by default": {words121, bootcfg.Want{Elsewhere: true}, nil},
		"both, an older image": {wordsOld, bootcfg.Want{Unsigned: true, Elsewhere: true},
			[]string{"module.sig_enforce=1 cros", "module.sig_enforce=0 cros", "=kernel-module ", "=kernel-module,firmware "}},
		"LoadPin, never named": {words81, bootcfg.Want{Elsewhere: true},
			[]string{" init=/usr", " loadpin.exclude=kernel-module,firmware init=/usr"}},
		"nothing": {words121, bootcfg.Want{}, nil},
		"said more than once": {"a module.sig_enforce=1 module.sig_enforce b", bootcfg.Want{Unsigned: true},
			[]string{"a module.sig_enforce=1 module.sig_enforce b", "a module.sig_enforce=0 module.sig_enforce=0 b"}},
	} {
		before := config(row.words)
		want := strings.NewReplacer(row.edits...).Replace(before)
		got, entries, err := bootcfg.Edit([]byte(before), row.want)
		if err != nil || entries != 5 {
			t.Errorf("%s: %d entries, %v; want all five", name, entries, err)
		}
		if diff := cmp.Diff(want, string(got)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		again, _, err := bootcfg.Edit(got, row.want)
		if err != nil || !bytes.Equal(again, got) {
			t.Errorf("%s: a second Edit changes the result: %v", name, err)
		}
		// The parser of package host was written independently of Edit. It must read the wanted values from the result.
		for line := range strings.Lines(string(got)) {
			_, cmdline, ok := strings.Cut(line, "vmlinuz")
			if p := host.ParseCmdline(cmdline); ok && row.want.Unsigned && !strings.Contains(line, "dm=") &&
				p.SignaturesEnforced {
				t.Errorf("%s: signatures are enforced still: %s", name, line)
			}
		}
	}
	for name, text := range map[string]string{"empty": "", "no entry": "set timeout=0\n# linux /x\n",
		"a name alone": "  linux /vmlinuz.A"} {
		if _, n, err := bootcfg.Edit([]byte(text), bootcfg.Want{Unsigned: true}); name != "a name alone" &&
			!fault.Is(err, fault.Unsupported) || name == "a name alone" && n != 1 {
			t.Errorf("%s: %d entries, %v", name, n, err)
		}
	}
}

// TestTooLong checks the limit of 2,047 bytes for a command line. The kernel cuts a longer one, and would then not find
// its root file system.
func TestTooLong(t *testing.T) {
	t.Parallel()
	for length, fits := range map[int]bool{2047: true, 2048: false} {
		words := strings.Repeat("x", length-len("BOOT_IMAGE=/vmlinuz  loadpin.exclude=kernel-module,firmware"))
		got, _, err := bootcfg.Edit([]byte("linux /vmlinuz "+words+"\n"), bootcfg.Want{Elsewhere: true})
		if (err == nil) != fits || fits && !bytes.Contains(got, []byte("firmware")) || !fits &&
			!fault.Is(err, fault.Unsupported) {
			t.Errorf("a command line of %d bytes: %v", length, err)
		}
	}
}

func partition(t *testing.T, text string) *os.Root {
	t.Helper()
	dir := t.TempDir()
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "efi/boot"), 0o755),
		os.WriteFile(filepath.Join(dir, "efi/boot/grub.cfg"), []byte(text), 0o755)); err != nil {
		t.Fatal(err)
	}
	esp, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = esp.Close() })
	return esp
}

func TestApplyAndUndo(t *testing.T) {
	t.Parallel()
	before := config(wordsOld)
	esp := partition(t, before)
	have := func() string {
		raw, err := esp.ReadFile("efi/boot/grub.cfg")
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	names := func() (all []string) {
		entries, err := fs.ReadDir(esp.FS(), "efi/boot")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			all = append(all, e.Name())
		}
		return all
	}
	if err := bootcfg.Undo(esp); !fault.Is(err, fault.NoArtifact) {
		t.Errorf("Undo of nothing = %v", err)
	}
	for i, want := range []bootcfg.Want{{Unsigned: true}, {Unsigned: true, Elsewhere: true}, {Unsigned: true}} {
		n, err := bootcfg.Apply(esp, want)
		if err != nil || (n == 5) != (i < 2) {
			t.Errorf("Apply %d = %d, %v", i, n, err)
		}
	}
	if have() == before || !cmp.Equal(names(), []string{"grub.cfg", "grub.cfg.prebake"}) {
		t.Errorf("after Apply there are %v", names())
	}
	if err := bootcfg.Undo(esp); err != nil || have() != before || !cmp.Equal(names(), []string{"grub.cfg"}) {
		t.Errorf("Undo = %v, and left are %v", err, names())
	}
	// Undo must keep a change that another program made.
	if _, err := bootcfg.Apply(esp, bootcfg.Want{Unsigned: true}); err != nil {
		t.Fatal(err)
	}
	updated := config(words121)
	if err := esp.WriteFile("efi/boot/grub.cfg", []byte(updated), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := bootcfg.Undo(esp); !fault.Is(err, fault.Mismatch) || have() != updated {
		t.Errorf("Undo after an update = %v; want a mismatch, and the updated file unchanged", err)
	}
	if _, err := bootcfg.Apply(esp, bootcfg.Want{Unsigned: true}); err != nil {
		t.Fatal(err)
	}
	if err := bootcfg.Undo(esp); err != nil || have() != updated {
		t.Errorf("Undo = %v; want the update's configuration", err)
	}
}

func TestSecureBoot(t *testing.T) {
	t.Parallel()
	const name = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
	efi := fstest.MapFS{"sys/firmware/efi/systab": {Data: []byte("x")}}
	value := func(v byte) fstest.MapFS { return fstest.MapFS{name: {Data: []byte{6, 0, 0, 0, v}}} }
	for what, row := range map[string]struct {
		root      fstest.MapFS
		log       []string
		on, known bool
	}{
		"on":                {value(1), nil, true, true},
		"off":               {value(0), []string{"<6>[    0.000000] secureboot: Secure boot enabled"}, false, true},
		"no variables, on":  {efi, []string{"<6>[    0.000000] secureboot: Secure boot enabled"}, true, true},
		"no variables, off": {efi, []string{"<6>[    0.000000] secureboot: Secure boot disabled"}, false, true},
		"nothing at all":    {efi, []string{"<6>[    9.000000] the log was wrapped"}, false, false},
		"no EFI":            {fstest.MapFS{}, nil, false, true},
		"of another length": {fstest.MapFS{name: {Data: []byte{1}}}, nil, false, false},
	} {
		if on, known := bootcfg.SecureBoot(row.root, row.log); on != row.on || known != row.known {
			t.Errorf("%s: %t, known %t; want %t, %t", what, on, known, row.on, row.known)
		}
	}
}

func FuzzEdit(f *testing.F) {
	f.Add([]byte(config(words121)), true, true)
	f.Add([]byte("linux /x a=\"b c\n\" d\r\n\tlinuxefi y"), true, false)
	f.Fuzz(func(t *testing.T, text []byte, unsigned, elsewhere bool) {
		want := bootcfg.Want{Unsigned: unsigned, Elsewhere: elsewhere}
		out, _, err := bootcfg.Edit(text, want)
		if err != nil {
			return
		}
		again, _, err := bootcfg.Edit(out, want)
		if err == nil && !bytes.Equal(again, out) {
			t.Errorf("Edit is not the same twice: %q, %q", out, again)
		}
		if bytes.Count(out, []byte("\n")) != bytes.Count(text, []byte("\n")) {
			t.Errorf("Edit changed the lines of %q", text)
		}
	})
}
