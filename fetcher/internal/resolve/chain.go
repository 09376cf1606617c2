package resolve

import (
	"context"
	"errors"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Chain asks one after the other until one has the artifact: a server first, which knows
// what is the default and what was yanked, and then registries and folders, which are there
// when the server is not.
type Chain []Finder

// Find returns the first answer that names an artifact, or says that nobody should have it.
// Where there is none, what may still become one counts most: a build on its way, then a
// source that may be back, then the first answer.
func (c Chain) Find(ctx context.Context, q Question) (Answer, error) {
	var pending, first *Answer
	// Once a server has said which driver it is, the others are asked for that one: a registry's
	// newest may be one that was yanked, or that nobody chose.
	var away, other error
	var farm Server // the one that answered
	for _, f := range c {
		a, err := f.Find(ctx, q)
		switch {
		case ctx.Err() != nil:
			return a, err
		case err == nil && (a.State == api.Published || a.State.Withdrawn() || a.State == api.Unsupported):
			return a, nil
		case fault.Is(err, fault.Transient):
			away = errors.Join(away, err)
		case fault.Is(err, fault.Usage): // a registry that is asked for the default
			other = errors.Join(other, err)
		case err != nil: // it answers, and not with the truth
			return a, err
		case a.Pending() && pending == nil:
			pending = &a
		case first == nil:
			first = &a
			if s, ok := f.(Server); ok {
				farm = s
			}
		}
		if err == nil && a.Source == SourceServer && a.Driver.Version != "" {
			q.Wish = target.Wish(a.Driver.Version)
			if a.Driver.Flavour != "" {
				q.Flavour = string(a.Driver.Flavour)
			}
		}
	}
	// Also where another source is away, which may have it: the farm makes one build of it.
	if first != nil && first.Missing != nil && pending == nil {
		if err := farm.request(ctx, first); err != nil {
			return *first, err
		}
	}
	switch {
	case pending != nil:
		return *pending, nil
	case first != nil && first.Pending():
		return *first, nil
	case away != nil:
		return Answer{}, away
	case first != nil:
		return *first, nil
	}
	return Answer{}, other
}
