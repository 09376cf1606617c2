package agent

import (
	"context"
	"strings"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/pkg/target"
)

// dryRun adds to the report what a run would do.
func (a *Agent) dryRun(ctx context.Context, r *Report, facts *host.Facts, store *install.Store) error {
	s, err := a.readState(ctx, store)
	if err != nil {
		return err
	}
	r.Answer, _, s.none = a.resolve(ctx, facts,
		func(named target.Driver) bool { return !servesNamed(s.current, s.question, named) },
		func(named target.Driver) *install.Set { return a.madeBefore(ctx, store, named) })
	silent := s.none != nil
	if !silent {
		s.wanted, s.none = a.fetchAndStage(ctx, r, store, facts, s.current)
	}
	d := decide(s)
	a.plan(r, s, d)
	if d.set != nil && a.upToDate(r.Answer, d.set, s, silent) {
		return nil
	}
	return d.err
}

// plan adds the actions on modules to the report.
func (a *Agent) plan(r *Report, s nodeState, d decision) {
	if a.cfg.NoLoad || d.set == nil {
		return
	}
	switch d.do {
	case replace:
		for _, m := range s.facts.Modules {
			r.did("unload %s", m.Name)
		}
		fallthrough
	case load:
		r.did("load %s", strings.Join(loaded, ", "))
	}
}
