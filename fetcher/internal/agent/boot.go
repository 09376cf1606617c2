package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/prebake/prebake/fetcher/internal/bootcfg"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/pkg/fault"
)

// bootFile has a record of the changes that this program made to the node's boot configuration.
const bootFile = ".prebake/boot.json"

// maxEdits is the maximum number of changes before the operator must act. Without this limit, a configuration that the
// boot loader ignores would cause endless reboots.
const maxEdits = 2

type bootEdits struct {
	// Edits is the number of changes since the kernel last accepted modules.
	Edits int       `json:"edits"`
	At    time.Time `json:"at"`
	// BootID is the id of the boot in which the last change was made or begun.
	BootID string `json:"bootId"`
	// Applied means that the change was made, and has not been undone since.
	Applied bool `json:"applied,omitempty"`
}

// BootReport describes the node's boot configuration.
type BootReport struct {
	Policy     host.Policy `json:"policy"`
	SecureBoot bool        `json:"secureBoot"`
	// Edits counts the changes since the kernel last accepted modules. Undone means that this call restored the
	// configuration.
	Edits  int  `json:"edits"`
	Undone bool `json:"undone,omitempty"`
}

// bootMaker changes the boot configuration. Package bootcfg has the real implementation.
type bootMaker interface {
	Apply(want bootcfg.Want) (entries int, err error)
	Undo() error
	// Reboot asks for an orderly reboot.
	Reboot() error
}

// editBoot changes the kernel command line and asks for a reboot, if the owner allows it and the given error is a
// [host.PolicyError]. It returns the given error with a note on what was done.
func (a *Agent) editBoot(ctx context.Context, r *Report, store *install.Store, facts *host.Facts,
	why error) (err error) {
	var want bootcfg.Want
	want.Unsigned, want.Elsewhere = facts.Policy.Restricts()
	var policy *host.PolicyError
	if !a.cfg.EditBoot || a.cfg.DryRun || store == nil || a.parts.Boot == nil || want == (bootcfg.Want{}) ||
		!errors.As(why, &policy) {
		return why
	}
	// Take the lock, because a run of another process may be loading a driver or changing the boot configuration. Both
	// runs would also write small files under the same temporary name.
	unlock, err := store.Lock(googleLock)
	if err != nil {
		return fmt.Errorf("%w; fetcher did not change the kernel command line: %w", why, err)
	}
	defer func() { err = errors.Join(err, unlock()) }()
	// A node that has any driver by now must not be rebooted.
	if mods, err := host.LoadedModules(a.node); err != nil || len(mods) > 0 {
		return errors.Join(why, err)
	}
	not := func(reason, hint string) error {
		return fault.Wrap(fault.Rejected, fmt.Errorf("%w; fetcher did not change the kernel command line: %s", why, reason),
			hint)
	}
	switch on, known := a.secureBoot(); {
	case !known:
		return not("cannot tell whether Secure Boot is on",
			"mount the firmware's variables (/sys/firmware/efi/efivars) into this container, or change the boot "+
				"configuration by hand")
	case on:
		return not("Secure Boot is on",
			"turn Secure Boot off for this node pool, or use a GKE GPU node pool, whose nodes load any module")
	}
	edits, err := readEdits(store)
	if err != nil {
		return errors.Join(why, err)
	}
	here := edits.BootID == a.bootID()
	if edits.Edits > 0 && !edits.Applied { // the last change began, but was not made
		edits.Edits--
	} else if edits.Edits > 0 && here {
		return a.reboot(r, fmt.Errorf("%w; fetcher changed the kernel command line since the last boot", why))
	}
	if edits.Edits >= maxEdits {
		return not(fmt.Sprintf("%d earlier changes by fetcher, the last one on %s, had no effect on the kernel", edits.Edits,
			edits.At.UTC().Format(time.DateTime)),
			"compare the command line of this boot (cat /proc/cmdline) with the boot configuration; to restore the "+
				"boot configuration and to reset this count: fetcher boot undo")
	}
	before := edits
	edits = bootEdits{Edits: edits.Edits + 1, At: a.parts.Now().UTC(), BootID: a.bootID()}
	if err := writeEdits(store, edits); err != nil { // before anything changes
		return errors.Join(why, err)
	}
	entries, err := a.parts.Boot.Apply(want)
	if err != nil {
		return errors.Join(why, fmt.Errorf("change kernel command line: %w", err), writeEdits(store, before))
	}
	edits.Applied = entries > 0 || before.Applied
	if entries == 0 {
		edits = before
	}
	if err := writeEdits(store, edits); err != nil {
		return errors.Join(why, err)
	}
	if entries == 0 {
		return not("the boot configuration has the parameters already, but this kernel was booted without them",
			"reboot the node; if this happens again, find out which boot configuration the node uses")
	}
	r.did("changed the kernel command line in %s of the boot configuration", plural(entries, "place"))
	a.parts.Log.WarnContext(ctx, "changed the kernel command line", "entries", entries, "want", want)
	return a.reboot(r, fmt.Errorf("%w; fetcher changed the kernel command line", why))
}

// reboot asks for a reboot. It returns the given error with a note on the reboot.
func (a *Agent) reboot(r *Report, why error) error {
	if err := a.parts.Boot.Reboot(); err != nil {
		return fault.Wrap(fault.Rejected, fmt.Errorf("%w: %w", why, err), "reboot the node")
	}
	r.did("asked for a reboot")
	return fault.Wrap(fault.Rejected, fmt.Errorf("%w, and the node reboots", why),
		"to undo the change of the kernel command line: fetcher boot undo")
}

func writeEdits(store *install.Store, e bootEdits) error {
	raw, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return errors.Join(store.WriteFile(bootFile, raw), store.Sync())
}

// bootAllows sets the count of changes of the boot configuration to 0 if the running kernel accepts modules. So a
// change that worked does not count towards maxEdits.
func (a *Agent) bootAllows(ctx context.Context, store *install.Store, facts *host.Facts) {
	signatures, place := facts.Policy.Restricts()
	if store == nil || a.cfg.DryRun || signatures || place {
		return
	}
	if e, err := readEdits(store); err != nil || e.Edits == 0 {
		return
	}
	err := a.locked(store, func() error {
		e, err := readEdits(store)
		if err != nil {
			return err
		}
		e.Edits = 0 // Applied stays, because the uninstall needs it
		return writeEdits(store, e)
	})
	if err != nil {
		a.parts.Log.WarnContext(ctx, "could not reset the count of boot configuration changes", "err", err)
	}
}

// undoBoot restores the boot configuration for an uninstall, if this program changed it.
func (a *Agent) undoBoot(r *Report, store *install.Store) error {
	e, err := readEdits(store)
	if err != nil || !e.Applied || a.parts.Boot == nil {
		return err
	}
	if err := a.parts.Boot.Undo(); err != nil && !fault.Is(err, fault.NoArtifact) {
		return fmt.Errorf("restore the boot configuration: %w", err)
	}
	r.did("restored the boot configuration; it takes effect at the next boot")
	return store.RemoveFile(bootFile)
}

func readEdits(store *install.Store) (e bootEdits, err error) {
	raw, err := store.ReadFile(bootFile)
	if err != nil || raw == nil {
		return e, err
	}
	if json.Unmarshal(raw, &e) != nil {
		e.Edits = maxEdits // the file is damaged: change nothing before an operator looks
	}
	return e, nil
}

func (a *Agent) secureBoot() (on, known bool) {
	lines, err := a.parts.Kernel.Log()
	if err != nil {
		lines = nil
	}
	return bootcfg.SecureBoot(a.node, lines)
}

// Boot reports what the node's kernel allows. If undo is true, it also restores the boot configuration.
func (a *Agent) Boot(undo bool) (r *BootReport, err error) {
	facts, err := a.Observe()
	if err != nil {
		return nil, err
	}
	r = &BootReport{Policy: facts.Policy}
	r.SecureBoot, _ = a.secureBoot()
	store, err := a.openInstalled()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r, err
	}
	if err == nil {
		defer func() { err = errors.Join(err, store.Close()) }()
		e, err := readEdits(store)
		if err != nil {
			return r, err
		}
		r.Edits = e.Edits
	}
	if !undo {
		return r, nil
	}
	if store != nil { // a run of another process may change the boot configuration
		unlock, lockErr := store.Lock(googleLock)
		if lockErr != nil {
			return r, lockErr
		}
		defer func() { err = errors.Join(err, unlock()) }()
	}
	if err := a.parts.Boot.Undo(); err != nil {
		return r, err
	}
	r.Undone, r.Edits = true, 0
	if store != nil {
		return r, store.RemoveFile(bootFile)
	}
	return r, nil
}
