package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm"
)

// grubConfig returns a GRUB configuration as on COS. It has two entries for each of the images A and B: one with a
// plain root, and one with a root that dm-verity verifies, which has a quoted argument. The model for the file is the
// test data of cos_image_analyzer in cos/tools. The kernel arguments are from /proc/cmdline on hosts of Cloud Shell.
func grubConfig() string {
	const words = "init=/usr/lib/systemd/systemd rootwait ro noresume loglevel=7 security=apparmor csm.disabled=1 " +
		"loadpin.exclude=kernel-module,firmware " +
		"modules-load=loadpin_trigger firmware_class.path=/var/lib/nvidia/firmware module.sig_enforce=1 i915.modeset=1 " +
		"cros_efi"
	var b strings.Builder
	b.WriteString("defaultA=2\ndefaultB=3\ngptpriority $grubdisk 2 prioA\nset timeout=0\n")
	for _, root := range []string{"      root=PARTUUID=E5822204-E5B9-2848-8A90-37790091EA3E",
		` root=/dev/dm-0 "dm-mod.create=vroot,,,ro,0 4077568 verity 0 PARTUUID=33380AF5 sha256 salt"`} {
		for _, side := range []string{"A", "B"} {
			fmt.Fprintf(&b, "\nmenuentry \"image %s\" {\n  linux /syslinux/vmlinuz.%s %s%s\n}\n", side, side, words, root)
		}
	}
	return b.String()
}

// TestNodeBootConfiguration checks a node whose kernel loads only signed modules. The fetcher changes the boot
// configuration on a real EFI partition. After the next boot, an install would load the unsigned modules. One command
// restores the configuration.
func TestNodeBootConfiguration(t *testing.T) {
	t.Parallel()
	if shared.passes.remembered(t, "builder", "server", "fetcher") {
		return
	}
	defer shared.turns.take(20)()
	k := shared.kernel(1)
	mustBuild(t, shared.srv, k, shared.driver(), target.Proprietary)
	boot, err := shared.Boot(t.Context(), shared.mirror, k)
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk")
	before := grubConfig()
	tool := func(stdin string, argv ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
		}
		return string(out)
	}
	if err := os.WriteFile(disk, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 64<<20); err != nil {
		t.Fatal(err)
	}
	// The disk has one partition, which begins at 1 MiB and has the name of COS's EFI partition.
	tool("label: gpt\nstart=2048, size=126976, type=U, name=EFI-SYSTEM\n", "sfdisk", "--quiet", disk)
	tool("", "mkfs.vfat", "--offset=2048", "-F", "32", disk, "63488")
	at := disk + "@@1M"
	tool("", "mmd", "-i", at, "::efi", "::efi/boot")
	tool(before, "mcopy", "-i", at, "-", "::efi/boot/grub.cfg")
	config := func() string { return tool("", "mtype", "-i", at, "::efi/boot/grub.cfg") }
	// words returns the kernel command line of the third entry: image A with a verified root.
	words := func() []string {
		line := strings.Split(strings.Split(config(), "menuentry")[3], "\n")[1]
		return []string{strings.TrimPrefix(strings.TrimSpace(line), "linux /syslinux/vmlinuz.A ")}
	}
	run := func(steps ...vm.Step) *vm.Result {
		t.Helper()
		res, err := shared.RunNode(t.Context(),
			testbed.Node{Kernel: k, Boot: boot, Key: shared.key + ".pub", Disk: disk, KernelArgs: words()}, steps)
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	step := func(res *vm.Result, name string, exit int, says string) {
		t.Helper()
		s, err := testbed.StepNamed(res, name)
		if err != nil {
			t.Fatal(err)
		}
		if s.ExitCode != exit || !bytes.Contains(append(s.Stdout, s.Stderr...), []byte(says)) {
			t.Errorf("%s ended with %d; want %d and %q:\n%s%s", name, s.ExitCode, exit, says, s.Stdout, s.Stderr)
		}
	}
	fetcher := func(name string, args ...string) vm.Step {
		return vm.Step{Name: name, Argv: append([]string{"/usr/bin/fetcher"}, args...), KeepGoing: true}
	}
	install := func(name string, more ...string) vm.Step {
		s := testbed.InstallStep(shared.srv,
			append([]string{"--driver", shared.driver(), "--flavour", "proprietary", "--output", "text"}, more...)...)
		s.Name = name
		return s
	}
	rejected := fault.Rejected.ExitCode()

	res := run(install("by default"), install("dry run", "--edit-boot", "--dry-run"), fetcher("status", "boot", "status"))
	step(res, "by default", rejected, "module.sig_enforce=1")
	step(res, "dry run", rejected, "module.sig_enforce=1")
	step(res, "status", 0, "module signatures enforced   yes")
	if config() != before {
		t.Fatal("the boot configuration was changed without --edit-boot")
	}
	// The virtual node has no systemd, so nothing reboots it.
	res = run(install("edit", "--edit-boot"), install("again", "--edit-boot"))
	step(res, "edit", rejected, "fetcher changed the kernel command line")
	step(res, "again", rejected, "changed the kernel command line since the last boot")
	if want := strings.ReplaceAll(before, "module.sig_enforce=1", "module.sig_enforce=0"); config() != want {
		t.Errorf("the boot configuration is\n%s\nwant\n%s", config(), want)
	}
	res = run(install("after the reboot", "--dry-run"), fetcher("status", "boot", "status"),
		fetcher("undo", "boot", "undo"))
	step(res, "after the reboot", 0, "would    load nvidia")
	step(res, "status", 0, "module signatures enforced   no")
	step(res, "undo", 0, "is restored")
	if config() != before {
		t.Errorf("after boot undo, the boot configuration is\n%s\nwant\n%s", config(), before)
	}
}
