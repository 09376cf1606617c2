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

// nodeState is all inputs of a decision. Nothing of it is asked for again.
type nodeState struct {
	facts *host.Facts
	// current and previous are the sets in force now and before; nil means none. staged are
	// all sets on the disk, these among them.
	current, previous *install.Set
	staged            []*install.Set
	// wanted is the verified set that the farm names; nil where there is none, and none
	// says why.
	wanted *install.Set
	none   error
	// question is what the node asked the farm.
	question resolve.Question
	attempts attempts
	// verifiable tells whether the statements beside a set hold; nil means that all do.
	verifiable func(*install.Set) bool
	// closed says why a driver that is loaded may not be replaced now; "" means that it may.
	closed string
	// replaceForeign, allowDowngrade, retry and noLoad are what the node's owner decides.
	replaceForeign, allowDowngrade, retry, noLoad bool
}

// kernelAction is what is to be done with the kernel.
type kernelAction string

const (
	// keep leaves the modules that are loaded, and adds those of the set that are not.
	keep kernelAction = "keep"
	// load loads the set into a kernel without a driver.
	load kernelAction = "load"
	// replace unloads the driver that is loaded, and loads the set.
	replace kernelAction = "replace"
	// refuse changes nothing at all.
	refuse kernelAction = "refuse"
)

// decision is what to do. With a set, that set is put in force as the verb says; err
// then says why it is not the one that the node is meant to have.
type decision struct {
	do  kernelAction
	set *install.Set
	err error
}

// decide says what to do about the node's driver. A driver that fits this build stays
// in force, or comes back into force, whatever the farm says, until another one can
// take its place.
func decide(s nodeState) decision {
	good := s.usableSet()
	stay := func(why error) decision {
		if good == nil {
			return decision{do: refuse, err: why}
		}
		d := s.put(good)
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
		return stay(fault.New(fault.Mismatch,
			fmt.Sprintf("driver %s is installed; driver %s, found for %s, is older", good.Driver, s.wanted.Driver,
				s.question.Wish),
			"name the version with --driver, or allow it: --allow-downgrade"))
	}
	d := s.put(s.wanted)
	if d.set == nil && good != nil && good.Digest != s.wanted.Digest {
		return stay(d.err)
	}
	return d
}

// usableSet is the set that may be in force: the current one, or else the one before.
func (s nodeState) usableSet() *install.Set {
	for _, set := range []*install.Set{s.current, s.previous} {
		if set != nil && fitsNode(set, s.facts) == nil && s.refused(set) == nil && s.acceptable(set) {
			return set
		}
	}
	return nil
}

// acceptable reports whether a set may be in force as far as its attestations go: those of one that runs are not asked
// for.
func (s nodeState) acceptable(set *install.Set) bool {
	return s.verifiable == nil || s.noLoad || s.verifiable(set) || s.runs(set)
}

// keepsForeign reports whether a foreign driver is loaded that is not to go.
func (s nodeState) keepsForeign() bool {
	return len(s.facts.Modules) > 0 && !s.noLoad && !s.replaceForeign && !s.ownLoaded()
}

// put says how a set gets into force, or why it cannot.
func (s nodeState) put(set *install.Set) decision {
	switch {
	case s.noLoad:
		return decision{do: keep, set: set}
	case len(s.facts.Modules) == 0:
		return s.allowed(set, load)
	case s.runs(set):
		return decision{do: keep, set: set}
	case !s.ownLoaded() && s.facts.Runs(set.Driver):
		// Somebody else loaded the same driver: it is adopted as it is.
		return decision{do: keep, set: set}
	case !s.ownLoaded() && !s.replaceForeign:
		return decision{do: refuse,
			err: fault.New(fault.Busy,
				fmt.Sprintf("another driver is loaded that this program did not install: %s", s.facts.Driver),
				"add --foreign replace to unload it, or reboot the node without the installer that loads it; until then it stays")}
	}
	if s.closed != "" {
		return decision{do: refuse,
			err: fault.New(fault.Busy, fmt.Sprintf("replace driver %s: %s", s.facts.Driver, s.closed),
				"wait until then, or reboot the node; the loaded driver stays meanwhile")}
	}
	if err := idle(s.facts); err != nil {
		return decision{do: refuse, err: err}
	}
	return s.allowed(set, replace)
}

// allowed asks the kernel's policy before anything is unloaded or switched.
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

// runs reports whether the loaded modules are those of a set. The kernel tells them
// by their build ids, or else by version and flavour; two editions of a release are
// told by what was in force.
func (s nodeState) runs(set *install.Set) bool {
	if !s.facts.Runs(set.Driver) || len(foreign(s.facts, set)) > 0 {
		return false
	}
	return s.current == nil || s.current.Driver == set.Driver || s.current.Driver.Modules() != set.Driver.Modules()
}

// ownLoaded reports whether the loaded driver is one that this program installed.
func (s nodeState) ownLoaded() bool {
	return slices.ContainsFunc(append([]*install.Set{s.current, s.previous}, s.staged...), func(set *install.Set) bool {
		return set != nil && s.facts.Runs(set.Driver) && len(foreign(s.facts, set)) == 0
	})
}

// refused says why a set is not to be tried again.
func (s nodeState) refused(set *install.Set) error {
	a := s.attempts[set.Digest]
	if a == nil || s.retry {
		return nil
	}
	return a.refused(set.Driver, s.another(set.Digest))
}

// another reports whether there is another driver that this node may run: a set, or one
// that somebody else loaded.
func (s nodeState) another(digest string) bool {
	if len(s.facts.Modules) > 0 && !s.ownLoaded() {
		return true
	}
	return slices.ContainsFunc([]*install.Set{s.current, s.previous}, func(set *install.Set) bool {
		if set == nil || set.Digest == digest || fitsNode(set, s.facts) != nil || !s.acceptable(set) {
			return false
		}
		a := s.attempts[set.Digest]
		return a == nil || a.refused(set.Driver, true) == nil
	})
}

// isDowngrade reports whether the farm's answer to a wish without an exact version is
// older than what is installed for it.
func (s nodeState) isDowngrade(good *install.Set) bool {
	if _, exact := s.question.Wish.Exact(); exact || s.question.Pin != "" || s.allowDowngrade ||
		!serves(good, s.question) {
		return false
	}
	return target.CompareVersions(s.wanted.Driver.Modules().Version, good.Driver.Modules().Version) < 0
}

// serves reports whether an installed set answers the question, as far as the node can
// tell by itself.
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
	// A branch means no edition of a release: these are asked for by their names.
	if b, named := q.Wish.BranchName(); named && (b != s.Driver.Branch() || s.Driver != s.Driver.Modules()) {
		return false
	}
	return q.Flavour == resolve.Auto || q.Flavour == string(s.Driver.Flavour)
}

// fitsNode refuses a set that was installed for another COS build.
func fitsNode(s *install.Set, facts *host.Facts) error {
	if s.Kernel.BuildID == facts.Kernel.BuildID && s.Kernel.Board == facts.Kernel.Board &&
		s.Kernel.Release == facts.Kernel.Release {
		return nil
	}
	return fault.New(fault.Mismatch,
		fmt.Sprintf("driver %s was installed for COS %s; this node runs %s", s.Driver, s.Kernel, facts.Kernel),
		"install a driver for this build: fetcher install --driver VERSION")
}

// idle refuses a driver that is in use, before anything of it is unloaded.
func idle(facts *host.Facts) error {
	for _, m := range facts.Modules {
		if m.Permanent {
			return fault.New(fault.Busy,
				fmt.Sprintf("unload driver %s: this kernel never unloads module %s", facts.Driver, m.Name),
				"reboot the node: the driver that is wanted is loaded then; until then the one in use stays as it is")
		}
	}
	if holders := facts.Holders(); len(holders) > 0 {
		return fault.New(fault.Busy,
			fmt.Sprintf("unload driver %s: in use by kernel module %s", facts.Driver, strings.Join(holders, ", ")),
			"unload that module (rmmod) and run this again; the driver in use stays as it is")
	}
	for _, m := range facts.Modules {
		if m.Refs > len(m.UsedBy) {
			by := plural(m.Refs-len(m.UsedBy), "open device")
			if len(facts.Users) > 0 {
				var names []string
				for _, u := range facts.Users {
					names = append(names, u.String())
				}
				by = strings.Join(names[:min(len(names), 4)], ", ")
				if more := len(names) - 4; more > 0 {
					by += fmt.Sprintf(" and %d more", more)
				}
			}
			return fault.New(fault.Busy, fmt.Sprintf("unload driver %s: module %s is in use by %s", facts.Driver, m.Name, by),
				"stop what uses the GPU and run this again; the driver in use stays as it is")
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
