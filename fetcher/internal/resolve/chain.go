package resolve

import (
	"context"
	"errors"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Chain asks several sources in order until one has the artifact. A server must come first, because it knows the
// default driver and what was yanked.
type Chain []Finder

// Find returns the first answer that has an artifact, or that forbids one (yanked, quarantined, unsupported). If no
// source gives such an answer, Find returns the first of these that exists: an answer about a running build, the errors
// of sources that did not respond or were asked too often, the first other answer, the errors of sources that cannot
// resolve the wish. If a web page answered, the error is of kind WebPage. If every source sent wrong bytes, the error
// is of kind Unverified. If only some did, and others did not respond, the error is passing (see [Passing]), so that
// the wait for the others goes on.
//
// If a source returns both an artifact and an error, Find asks no other source: this source has chosen a driver, but
// cannot tell whether it drives the node's GPUs. Another source would choose another version, or a flavour without the
// list of GPUs.
func (c Chain) Find(ctx context.Context, q Question) (Answer, error) {
	var pending, first *Answer
	// After a source has chosen the driver, ask the others for that driver only: their newest driver may be yanked, or
	// they may lack the list of GPUs.
	var away, page, other error
	var farm Server // the server that gave the answer "first"
	wrong := true   // whether all errors in away are of OtherService
	for _, f := range c {
		a, err := f.Find(ctx, q)
		switch {
		case ctx.Err() != nil:
			return a, err
		case err == nil && (a.State == api.Published || a.State.Withdrawn() || a.State == api.Unsupported):
			return a, nil
		case (Passing(err) || fault.Is(err, fault.Usage)) && a.State == api.Published:
			return Answer{}, err
		case Passing(err):
			away = errors.Join(away, err)
			wrong = wrong && IsOtherService(err)
			if page == nil && fault.Is(err, fault.WebPage) {
				page = err
			}
		case fault.Is(err, fault.Usage): // for example a registry that is asked for the default
			other = errors.Join(other, err)
		case err != nil: // the source answered, but wrongly
			return a, err
		case a.Pending() && pending == nil:
			pending = &a
		case first == nil:
			first = &a
			if s, ok := f.(Server); ok {
				farm = s
			}
		}
		if (a.Source == SourceServer || err != nil) && a.Driver.Version != "" {
			q.Wish = target.Wish(a.Driver.Version)
			if a.Driver.Flavour != "" {
				q.Flavour = string(a.Driver.Flavour)
			}
		}
	}
	// A source that did not respond may have the artifact. Asking for a build then costs at most one needless build for
	// all nodes.
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
	case page != nil:
		return Answer{}, fault.Wrap(fault.WebPage, away, fault.Hint(page))
	case away != nil && wrong && first == nil:
		return Answer{}, fault.Wrap(fault.Unverified, away, fault.Hint(away))
	case away != nil:
		return Answer{}, away
	case first != nil:
		return *first, nil
	}
	return Answer{}, other
}

// otherService is an error of kind Transient, whose cause is of kind Unverified.
type otherService struct{ error }

// Unwrap returns the wrapped error.
func (o otherService) Unwrap() error { return o.error }

// OtherService makes an error of kind Unverified a passing one, so that a [Chain] asks its next source. If all sources
// fail so, the chain returns an error of kind Unverified.
func OtherService(err error, hint string) error {
	return otherService{fault.Wrap(fault.Transient, err, hint)}
}

// IsOtherService reports whether one of the errors in err is of [OtherService].
func IsOtherService(err error) bool { return errors.As(err, new(otherService)) }
