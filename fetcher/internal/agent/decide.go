package agent

import (
	"fmt"
	"slices"
	"strings"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// nodeState has all inputs of a decision. The decision reads nothing else.
type nodeState struct {
	facts *host.Facts
	// current is the active driver, and previous is the one before it; nil means none. staged has all drivers on the disk.
	current, previous *install.Set
	staged            []*install.Set
	// wanted is the verified driver that the farm offers. If it is nil, none is the reason.
	wanted *install.Set
	none   error
	// question is the node's question to the farm.
	question resolve.Question
	attempts attempts
	// verifiable reports whether the statements of a driver on the disk verify. If it is nil, all verify.
	verifiable func(*install.Set) bool
	// closed is the reason why a loaded driver may not be replaced now, or "".
	closed string
	// labelled means that the node's label is the source of the wish, not --driver.
	labelled bool
	// pin is the digest of the only artifact that the owner wants, or "".
	pin string
	// replaceForeign, allowDowngrade, retry and noLoad are settings of the node's owner.
	replaceForeign, allowDowngrade, retry, noLoad bool
}

// kernelAction is the action on the modules in the kernel.
type kernelAction string

const (
	// keep means that the loaded modules stay, and missing modules are loaded.
	keep kernelAction = "keep"
	// load means that no driver is loaded yet, and the chosen one will be.
	load kernelAction = "load"
	// replace means that the chosen driver replaces the loaded one.
	replace kernelAction = "replace"
	// refuse means that nothing is changed.
	refuse kernelAction = "refuse"
)

// decision holds the driver to activate, and the action on the kernel's modules. A nil set means no change. err is the
// reason why the set is not the wanted driver.
type decision struct {
	do  kernelAction
	set *install.Set
	err error
}

// decide chooses the node's driver. A driver that fits this COS build stays active until another driver can replace it,
// whatever the farm answers.
func decide(s nodeState) decision {
	good := s.usableSet()
	stay := func(why error) decision {
		if good == nil {
			return decision{do: refuse, err: why}
		}
		d := s.put(good)
		if d.set == nil && s.waitsForRollback() {
			return decision{do: keep, set: s.current, err: d.err}
		}
		if d.set == nil {
			return decision{do: refuse, err: firstOf(why, d.err)}
		}
		d.err = why
		return d
	}
	if s.wanted == nil {
		return stay(s.none)
	}
	if why := s.refused(s.wanted); why != nil {
		return stay(why)
	}
	if good != nil && s.isDowngrade(good) {
		from := "--driver"
		if s.labelled {
			from = "the node's label"
		}
		return stay(fault.New(fault.Mismatch,
			fmt.Sprintf("driver %s, found for %s %s, is older than the installed driver %s", s.wanted.Driver, from,
				s.question.Wish, good.Driver),
			"to install the older driver, set "+from+" to its version, or add --allow-downgrade"))
	}
	d := s.put(s.wanted)
	if d.set == nil && good != nil && (good.Digest != s.wanted.Digest || s.waitsForRollback()) {
		return stay(d.err)
	}
	return d
}

// usableSet returns the current driver if it may be active, or else the previous one. It returns nil if neither may be
// active.
func (s nodeState) usableSet() *install.Set {
	for _, set := range []*install.Set{s.current, s.previous} {
		if set != nil && fitsNode(set, s.facts) == nil && s.refused(set) == nil && s.acceptable(set) {
			return set
		}
	}
	return nil
}

// waitsForRollback reports whether an operator rolled the current driver back, and the driver is still loaded because
// it was in use.
func (s nodeState) waitsForRollback() bool {
	if s.current == nil || s.attempts[s.current.Digest] == nil {
		return false
	}
	return s.attempts[s.current.Digest].ByHand && !s.retry && s.runs(s.current) && fitsNode(s.current, s.facts) == nil
}

// acceptable reports whether the attestations of a driver on the disk allow it to be active. A loaded driver needs no
// check.
func (s nodeState) acceptable(set *install.Set) bool {
	return s.verifiable == nil || s.noLoad || s.verifiable(set) || s.runs(set)
}

// keepsForeign reports whether a foreign driver is loaded, and the owner's settings do not permit to replace it.
func (s nodeState) keepsForeign() bool {
	return len(s.facts.Modules) > 0 && !s.noLoad && !s.replaceForeign && !s.ownLoaded()
}

// put returns the decision that makes a driver active. If that is not possible now, the decision has no set, and err is
// the reason.
func (s nodeState) put(set *install.Set) decision {
	switch {
	case s.noLoad:
		return decision{do: keep, set: set}
	case len(s.facts.Modules) == 0:
		return s.allowed(set, load)
	case changing(s.facts, required...) != nil:
		return decision{do: refuse, err: changing(s.facts, required...)}
	case s.runs(set):
		return decision{do: keep, set: set}
	case !s.ownLoaded() && s.facts.Runs(set.Driver):
		// Another program loaded the same driver. Its modules stay as they are.
		return decision{do: keep, set: set}
	case !s.ownLoaded() && !s.replaceForeign:
		return decision{do: refuse,
			err: fault.New(fault.Busy,
				fmt.Sprintf("driver %s is loaded, which another installer put on this node", s.facts.Driver),
				"add --foreign replace to unload the foreign driver, or remove the installer that loads it and reboot the node")}
	}
	if s.closed != "" {
		return decision{do: refuse,
			err: fault.New(fault.Busy, fmt.Sprintf("replace driver %s: %s", s.facts.Driver, s.closed),
				"wait for the hours of --maintenance, or reboot the node; until then the loaded driver stays in use")}
	}
	if err := idle(s.facts); err != nil {
		return decision{do: refuse, err: err}
	}
	return s.allowed(set, replace)
}

// allowed returns a decision for a driver, or a refusal if the kernel's policy forbids one of its modules. Call it
// before anything is unloaded or switched.
func (s nodeState) allowed(set *install.Set, do kernelAction) decision {
	for _, m := range set.Modules {
		if !isLoaded(m.Name) {
			continue
		}
		if err := s.facts.Policy.Allows(m.Name, m.Signed); err != nil {
			return decision{do: refuse, err: err}
		}
	}
	return decision{do: do, set: set}
}

// runs reports whether the loaded modules are those of a driver on the disk, by version, flavour and known build ids.
// Of two editions with the same modules, the active edition counts as loaded.
func (s nodeState) runs(set *install.Set) bool {
	if !s.facts.Runs(set.Driver) || len(foreign(s.facts, set)) > 0 {
		return false
	}
	return s.current == nil || s.current.Driver == set.Driver || s.current.Driver.Modules() != set.Driver.Modules()
}

// ownLoaded reports whether this program installed the loaded driver.
func (s nodeState) ownLoaded() bool {
	return slices.ContainsFunc(append([]*install.Set{s.current, s.previous}, s.staged...), func(set *install.Set) bool {
		return set != nil && s.facts.Runs(set.Driver) && len(foreign(s.facts, set)) == 0
	})
}

// refused returns the reason why a driver must not be tried again, or nil.
func (s nodeState) refused(set *install.Set) error {
	a := s.attempts[set.Digest]
	if a == nil || s.retry {
		return nil
	}
	return a.refused(set.Driver, s.another(set.Digest), s.labelled, s.pin)
}

// onlyRolledBack reports whether a driver is refused, but only because an operator rolled it back.
func (s nodeState) onlyRolledBack(set *install.Set) bool {
	if set == nil || s.refused(set) == nil || !s.attempts[set.Digest].ByHand {
		return false
	}
	rest := *s.attempts[set.Digest]
	rest.ByHand = false
	return rest.refused(set.Driver, true, s.labelled, s.pin) == nil
}

// another reports whether the node may run a driver with another digest: the active, the previous or a loaded foreign
// driver.
func (s nodeState) another(digest string) bool {
	if len(s.facts.Modules) > 0 && !s.ownLoaded() {
		return true
	}
	return slices.ContainsFunc([]*install.Set{s.current, s.previous}, func(set *install.Set) bool {
		if set == nil || set.Digest == digest || fitsNode(set, s.facts) != nil || !s.acceptable(set) {
			return false
		}
		a := s.attempts[set.Digest]
		return a == nil || a.refused(set.Driver, true, s.labelled, s.pin) == nil
	})
}

// isDowngrade reports whether the wanted driver is older than the installed one. It is false if the owner asked for an
// exact version or allowed downgrades.
func (s nodeState) isDowngrade(good *install.Set) bool {
	if _, exact := s.question.Wish.Exact(); exact || s.question.Pin != "" || s.allowDowngrade ||
		!serves(good, s.question) {
		return false
	}
	return target.CompareVersions(s.wanted.Driver.Modules().Version, good.Driver.Modules().Version) < 0
}

// serves reports whether an installed driver matches the question, as far as the node can tell without the farm.
func serves(s *install.Set, q resolve.Question) bool {
	if s == nil || s.Kernel.BuildID != q.Kernel.BuildID || s.Kernel.Board != q.Kernel.Board ||
		s.Kernel.Release != q.Kernel.Release {
		return false
	}
	if q.Pin != "" {
		return q.Pin == s.Digest
	}
	if v, exact := q.Wish.Exact(); exact && v != s.Driver.Version {
		return false
	}
	// A wish for a branch never means an edition. An edition needs its full version. Only the farm knows the lists of GPU
	// types, but a list's driver for a branch belongs to that branch.
	wish, _ := q.Wish.GPU()
	if b, named := wish.BranchName(); named && (b != s.Driver.Branch() || s.Driver != s.Driver.Modules()) {
		return false
	}
	return q.Flavour == resolve.Auto || q.Flavour == string(s.Driver.Flavour)
}

// fitsNode returns an error if a driver was installed for another COS build than the node's.
func fitsNode(s *install.Set, facts *host.Facts) error {
	if s.Kernel.BuildID == facts.Kernel.BuildID && s.Kernel.Board == facts.Kernel.Board &&
		s.Kernel.Release == facts.Kernel.Release {
		return nil
	}
	return fault.New(fault.Mismatch,
		fmt.Sprintf("driver %s was installed for COS %s; this node runs %s", s.Driver, s.Kernel, facts.Kernel),
		"install a driver for the COS build of this node: fetcher install --driver VERSION")
}

// idle returns an error of kind Busy if the loaded driver is in use or cannot be unloaded. Call it before the first
// module is unloaded.
func idle(facts *host.Facts) error {
	if err := changing(facts); err != nil {
		return err
	}
	for _, m := range facts.Modules {
		if m.Permanent {
			return fault.New(fault.Busy,
				fmt.Sprintf("unload driver %s: this kernel never unloads module %s", facts.Driver, m.Name),
				"reboot the node to load the wanted driver; until then the loaded driver stays in use")
		}
	}
	if holders := facts.Holders(); len(holders) > 0 {
		return fault.New(fault.Busy,
			fmt.Sprintf("unload driver %s: it is in use by kernel module %s", facts.Driver, strings.Join(holders, ", ")),
			"unload that module with rmmod, then run fetcher again; until then the loaded driver stays in use")
	}
	for _, m := range facts.Modules {
		if m.Refs > len(m.UsedBy) {
			by := plural(m.Refs-len(m.UsedBy), "open device")
			if names := host.Programs(facts.Users); len(names) > 0 {
				by = strings.Join(names[:min(len(names), 4)], ", ")
				if more := len(names) - 4; more > 0 {
					by += " and " + plural(more, "more program")
				}
			}
			return fault.New(fault.Busy, fmt.Sprintf("unload driver %s: module %s is in use by %s", facts.Driver, m.Name, by),
				"stop the programs that use the GPU (\"fetcher status\" lists their processes), then run fetcher again; until "+
					"then the loaded driver stays in use")
		}
	}
	return nil
}

// changing returns an error of kind Busy if the kernel is still loading or unloading one of these modules. Without
// names, it looks at all modules of the driver. Until the kernel has finished, nobody can tell which driver is loaded.
func changing(facts *host.Facts, names ...string) error {
	for _, m := range facts.Modules {
		if m.Changing && (len(names) == 0 || slices.Contains(names, m.Name)) {
			return fault.New(fault.Busy, fmt.Sprintf("the kernel is still loading or unloading module %s", m.Name),
				"wait until the other program has loaded or unloaded the driver, then run fetcher again")
		}
	}
	return nil
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
