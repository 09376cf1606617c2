package doctor

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/prebake/prebake/builder/internal/licence"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
)

// mayPublish returns a function for [Machine.MayGo]. The function applies the given rule, and opens a destination with
// the given registry options.
func mayPublish(
	rule licence.Rule,
	options func(destination string) registry.Options,
) func(context.Context, string, target.Flavour) error {
	return func(ctx context.Context, name string, f target.Flavour) (err error) {
		if strings.HasPrefix(name, "file:") {
			return nil // artifacts in a folder stay on this machine, and tarball.Open would create the folder
		}
		if tarball.Is(name) {
			b, err := tarball.Open(ctx, name)
			if err != nil {
				return err
			}
			return errors.Join(rule.Check(ctx, b.URL(""), b, f), b.Close())
		}
		repo, err := registry.Open(name, options(name))
		if err != nil {
			return err
		}
		return rule.Check(ctx, name, repo, f)
	}
}

// licence reports whether artifacts of each flavour may go to a destination. It adds a failure if neither flavour may
// go there, and a warning if only one may.
func (e *examination) licence(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(ctx, networkTimeout)
	defer cancel()
	var refused []error
	for _, f := range []target.Flavour{target.Open, target.Proprietary} {
		switch err := e.m.MayGo(ctx, name, f); {
		case fault.Is(err, fault.PublishRefused):
			refused = append(refused, err)
		case err != nil:
			e.fail("licence", err, "check the name of the destination in --to, and the network")
			return
		}
	}
	switch len(refused) {
	case 0:
		e.ok("licence", "artifacts of both flavours may go to %s", name)
	case 1:
		e.add(Finding{Check: "licence", Level: Warn, Text: refused[0].Error(), Next: fault.Hint(refused[0])})
	default:
		e.fail("licence", refused[0], fmt.Sprintf("if only you can read the destination, add --private %s", name))
	}
}
