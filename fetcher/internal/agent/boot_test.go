package agent_test

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/bootcfg"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// bootMaker stands in for the code that changes the boot loader's configuration. It records the requests.
type bootMaker struct {
	wants   []bootcfg.Want
	reboots int
	entries int
	undone  bool
	err     error
}

func (b *bootMaker) Apply(want bootcfg.Want) (int, error) {
	b.wants = append(b.wants, want)
	return b.entries, b.err
}

func (b *bootMaker) Reboot() error {
	b.reboots++
	return nil
}

func (b *bootMaker) Undo() error {
	b.undone = true
	return nil
}

// TestEditBoot checks when the agent changes the kernel's command line: only if the operator allows it, only if the
// change helps, and at most twice.
func TestEditBoot(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	maker := &bootMaker{entries: 5}
	n.parts.Boot = maker
	enforce := func(on string) { sample.Write(t, n.root, "sys/module/module/parameters/sig_enforce", on+"\n") }
	run := func(what, text string, edits, reboots int) {
		t.Helper()
		_, err := n.run(t, ref, p.Digest, c.Driver)
		if !fault.Is(err, fault.Rejected) || !strings.Contains(err.Error(), text) || fault.Hint(err) == "" {
			t.Errorf("%s: Run = %v (hint %s); want rejected, with %q", what, err, fault.Hint(err), text)
		}
		if len(maker.wants) != edits || maker.reboots != reboots || len(n.kernel.calls) > 0 {
			t.Errorf("%s: %d edits, %d reboots, calls %v; want %d and %d", what, len(maker.wants), maker.reboots, n.kernel.calls,
				edits, reboots)
		}
	}
	enforce("Y")
	run("by default", "module.sig_enforce=1", 0, 0)
	n.cfg.EditBoot, n.cfg.DryRun = true, true
	run("in a dry run", "module.sig_enforce=1", 0, 0)
	n.cfg.DryRun = false
	sample.Write(t, n.root, "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c",
		"\x06\x00\x00\x00\x01")
	run("with Secure Boot", "Secure Boot is on", 0, 0)
	sample.Write(t, n.root, "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c",
		"\x06\x00\x00\x00\x00")
	run("the first time", "and the node reboots", 1, 1)
	if maker.wants[0] != (bootcfg.Want{Unsigned: true}) {
		t.Errorf("wanted was %+v; want unsigned modules, and nothing else", maker.wants[0])
	}
	run("again, in the same boot: it is asked for again", "changed the kernel command line since the last boot", 1, 2)
	n.reboot(t)
	run("after a reboot that was of no use", "and the node reboots", 2, 3)
	n.reboot(t)
	run("after the second", "2 earlier changes", 2, 3)
	n.reboot(t)
	run("and ever after", "2 earlier changes", 2, 3)
	// Once the kernel accepts unsigned modules, the agent must reset its count of changes.
	enforce("N")
	if r, err := n.run(t, ref, p.Digest, c.Driver); err != nil || r.Verdict.State != gpucheck.Ready {
		t.Fatalf("Run = %+v, %v; want ready", r.Verdict, err)
	}
	if r, err := agent.New(n.cfg, n.parts).Boot(false); err != nil || r.Edits != 0 || r.Policy.SignaturesEnforced {
		t.Errorf("Boot = %+v, %v; want no recorded change", r, err)
	}
	// The command line already has the parameters, so a reboot would not help. The agent must not reboot the node.
	n.reboot(t)
	enforce("Y")
	maker.entries = 0
	if _, err := n.run(t, ref, p.Digest, c.Driver); !fault.Is(err, fault.Rejected) ||
		!strings.Contains(err.Error(), "has the parameters already") || maker.reboots != 3 {
		t.Errorf("Run = %v, %d reboots; want none more", err, maker.reboots)
	}
	r, err := agent.New(n.cfg, n.parts).Boot(true)
	if err != nil || !r.Undone || !maker.undone {
		t.Errorf("Boot, undone = %+v, %v", r, err)
	}
	if r, err := agent.New(n.cfg, n.parts).Boot(false); err != nil || r.Edits != 0 {
		t.Errorf("Boot afterwards = %+v, %v; want no recorded change", r, err)
	}
}

// TestLockdown checks the errors of a node whose kernel refuses all modules because of lockdown or LoadPin. A change of
// the command line can help only against LoadPin.
func TestLockdown(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	for file, row := range map[string]struct {
		text, cmdline, says string
		want                bootcfg.Want
	}{
		"sys/kernel/security/lockdown": {"none [integrity] confidentiality\n", "ro\n", "locked down (integrity)",
			bootcfg.Want{}},
		"proc/sys/kernel/loadpin/enforce":  {"1\n", "ro\n", "LoadPin", bootcfg.Want{Elsewhere: true}},
		"sys/kernel/security/lockdown.off": {"", "ro\n", "", bootcfg.Want{}},
	} {
		n := newNode(t, c, 1, key)
		n.reboot(t)
		maker := &bootMaker{entries: 5}
		n.parts.Boot, n.cfg.EditBoot = maker, true
		sample.Write(t, n.root, file, row.text)
		sample.Write(t, n.root, "proc/cmdline", row.cmdline)
		_, err := n.run(t, ref, p.Digest, c.Driver)
		if (row.says == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v; want %q", file, err, row.says)
		}
		if row.want == (bootcfg.Want{}) && len(maker.wants) > 0 || row.want != (bootcfg.Want{}) &&
			(len(maker.wants) != 1 || maker.wants[0] != row.want) {
			t.Errorf("%s: wanted was %+v; want %+v", file, maker.wants, row.want)
		}
	}
}

// TestEditBootSpares checks two cases in which the agent must not change the command line: a driver works already, or a
// module is refused for another reason.
func TestEditBootSpares(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	maker := &bootMaker{entries: 5}
	n.parts.Boot, n.cfg.EditBoot = maker, true
	sample.Write(t, n.root, "sys/module/module/parameters/sig_enforce", "Y\n")
	// The kernel enforces signatures, so it would refuse the newer driver. The older driver is loaded and works.
	r, err := n.run(t, ref, pn.Digest, newer.Driver)
	if !fault.Is(err, fault.Rejected) || r.Verdict.Digest != po.Digest || len(maker.wants)+maker.reboots > 0 {
		t.Errorf("Run = %+v, %v; %d edits, %d reboots; want no edit, and the loaded driver kept", r.Verdict, err,
			len(maker.wants), maker.reboots)
	}
	// The kernel accepts unsigned modules, but loading fails with EINVAL, as for a wrong module parameter.
	sample.Write(t, n.root, "sys/module/module/parameters/sig_enforce", "N\n")
	n.reboot(t)
	sample.Write(t, n.root, "proc/sys/kernel/loadpin/enforce", "1\n") // LoadPin is on but excludes modules, as on COS
	n.kernel.refuse["nvidia "+oldVersion], n.kernel.refuse["nvidia "+newVersion] = syscall.EINVAL, syscall.EINVAL
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err == nil || len(maker.wants)+maker.reboots > 0 {
		t.Errorf("Run = %v; %d edits; want none", err, len(maker.wants))
	}
}

// TestEditBootFails checks that the agent does not count a change that failed. It also checks that an uninstall
// restores the former command line.
func TestEditBootFails(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	maker := &bootMaker{entries: 5, err: errors.New("no such partition")}
	n.parts.Boot, n.cfg.EditBoot = maker, true
	sample.Write(t, n.root, "sys/module/module/parameters/sig_enforce", "Y\n")
	for range 4 {
		if _, err := n.run(t, ref, p.Digest, c.Driver); err == nil || !strings.Contains(err.Error(), "no such partition") {
			t.Errorf("Run = %v; want the reason why the change fails", err)
		}
		n.reboot(t)
	}
	maker.err = nil
	if _, err := n.run(t, ref, p.Digest, c.Driver); err == nil || !strings.Contains(err.Error(), "and the node reboots") {
		t.Errorf("Run = %v; want the command line changed", err)
	}
	if _, err := n.uninstall(); err != nil || !maker.undone {
		t.Errorf("Uninstall = %v, undone %t; want the boot configuration restored", err, maker.undone)
	}
}
