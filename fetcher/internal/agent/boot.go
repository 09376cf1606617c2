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

// bootFile counts how often this program changed the node's boot configuration.
const bootFile = ".prebake/boot.json"

// maxEdits is how often it does so before it asks somebody: a configuration that the boot
// loader does not read would have the node reboot for ever.
const maxEdits = 2

// bootEdits is what is known of earlier changes.
type bootEdits struct {
	Edits int       `json:"edits"`
	At    time.Time `json:"at"`
	// BootID is the boot in which the last one was made.
	BootID string `json:"bootId"`
}

// BootReport is what the node's boot configuration is about.
type BootReport struct {
	Policy     host.Policy `json:"policy"`
	SecureBoot bool        `json:"secureBoot"`
	// Edits is how often this program changed the configuration since the kernel last
	// loaded modules of its; Undone says that it was put back now.
	Edits  int  `json:"edits"`
	Undone bool `json:"undone,omitempty"`
}

// bootMaker changes the configuration; package bootcfg has the one that does.
type bootMaker interface {
	Apply(want bootcfg.Want) (entries int, err error)
	Undo() error
	// Reboot asks for an orderly reboot.
	Reboot() error
}

// editBoot changes the kernel command line where it is what keeps the modules out (why),
// and asks for a reboot.
func (a *Agent) editBoot(ctx context.Context, r *Report, store *install.Store, facts *host.Facts, why error) error {
	var want bootcfg.Want
	want.Unsigned, want.Elsewhere = facts.Policy.Restricts()
	if !a.cfg.EditBoot || a.cfg.DryRun || store == nil || a.parts.Boot == nil || !fault.Is(why, fault.Rejected) || want == (bootcfg.Want{}) || len(facts.Modules) > 0 {
		return why
	}
	not := func(reason, hint string) error {
		return fault.Wrap(fault.Rejected, fmt.Errorf("%w; the kernel command line is not changed: %s", why, reason), hint)
	}
	if a.secureBoot() {
		return not("Secure Boot is on", "turn Secure Boot off for this node pool, or use nodes that load any module")
	}
	edits, err := readEdits(store)
	if err != nil {
		return errors.Join(why, err)
	}
	if edits.Edits >= maxEdits {
		return not(fmt.Sprintf("that was done %d times, the last time on %s, and the kernel does what it did", edits.Edits, edits.At.UTC().Format(time.DateTime)),
			"see what the node boots with: cat /proc/cmdline; fetcher boot undo puts the configuration back and forgets this")
	}
	if edits.Edits > 0 && edits.BootID == a.bootID() {
		return not("it was changed in this boot, and the node has not rebooted yet", "reboot the node")
	}
	edits.Edits, edits.At, edits.BootID = edits.Edits+1, a.parts.Now().UTC(), a.bootID()
	raw, err := json.Marshal(edits)
	if err == nil { // before anything is changed: whatever comes of it counts
		err = errors.Join(store.WriteFile(bootFile, raw), store.Sync())
	}
	if err != nil {
		return errors.Join(why, err)
	}
	entries, err := a.parts.Boot.Apply(want)
	if err != nil {
		return errors.Join(why, fmt.Errorf("change kernel command line: %w", err))
	}
	if entries == 0 {
		return not("the boot configuration allows it already, and this kernel was booted without it", "reboot the node, or see what boots it")
	}
	r.did("changed the kernel command line of %s", plural(entries, "boot entry"))
	a.parts.Log.WarnContext(ctx, "changed the kernel command line", "entries", entries, "want", want)
	if err := a.parts.Boot.Reboot(); err != nil {
		return fault.Wrap(fault.Rejected, fmt.Errorf("%w; the kernel command line is changed: %w", why, err), "reboot the node")
	}
	r.did("asked for a reboot")
	return fault.Wrap(fault.Rejected, fmt.Errorf("%w; the kernel command line is changed, and the node reboots", why), "fetcher boot undo takes it back")
}

// bootAllows forgets earlier changes once the kernel does not hold modules back.
func (a *Agent) bootAllows(ctx context.Context, store *install.Store, facts *host.Facts) {
	signatures, place := facts.Policy.Restricts()
	if store == nil || a.cfg.DryRun || signatures || place {
		return
	}
	if raw, err := store.ReadFile(bootFile); err == nil && raw != nil {
		if err := store.RemoveFile(bootFile); err != nil {
			a.parts.Log.WarnContext(ctx, "forget changes of the kernel command line", "err", err)
		}
	}
}

func readEdits(store *install.Store) (e bootEdits, err error) {
	raw, err := store.ReadFile(bootFile)
	if err != nil || raw == nil {
		return e, err
	}
	if json.Unmarshal(raw, &e) != nil {
		e.Edits = maxEdits // damaged: somebody has to look
	}
	return e, nil
}

func (a *Agent) secureBoot() bool {
	lines, err := a.parts.Kernel.Log()
	if err != nil {
		lines = nil
	}
	return bootcfg.SecureBoot(a.node, lines)
}

// Boot reports what the node's kernel allows, and with undo puts back the boot
// configuration that this program changed.
func (a *Agent) Boot(undo bool) (r *BootReport, err error) {
	facts, err := a.Observe()
	if err != nil {
		return nil, err
	}
	r = &BootReport{Policy: facts.Policy, SecureBoot: a.secureBoot()}
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
	if err := a.parts.Boot.Undo(); err != nil {
		return r, err
	}
	r.Undone, r.Edits = true, 0
	if store != nil {
		return r, store.RemoveFile(bootFile)
	}
	return r, nil
}
