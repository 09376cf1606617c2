package pipeline_test

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/licence"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit/distribution"
)

// publicRegistries returns a licence rule that gives every registry a public address. Otherwise all registries would
// count as private, because they run on this machine.
func publicRegistries(says bundle.Redistribution, private ...string) licence.Rule {
	return licence.Rule{Redistribute: says, Private: private,
		Addresses: func(context.Context, string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("203.0.113.9")}, nil // an example address of RFC 5737
		}}
}

// TestLicenceRule checks that a flavour under NVIDIA's licence does not go to a registry that everybody can read. The
// build must end before the compile, with a hint.
func TestLicenceRule(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	cache := emptyCache(t)
	free, locked := distribution.Start(t)+"/prebake/driver", distribution.StartProtected(t)+"/prebake/driver"
	login := func(dest string) registry.Options {
		if dest == locked {
			return registry.Options{Username: distribution.User, Password: distribution.Password}
		}
		return registry.Options{}
	}
	for _, row := range []struct {
		name string
		to   []string
		rule licence.Rule
		hint string // "" means that the build publishes
	}{
		{"public", []string{free}, publicRegistries(""), "--private " + free},
		{"marked, and open to everybody", []string{free}, publicRegistries("", free),
			"revoke public read access to the destination"},
		{"one of two", []string{locked, free}, publicRegistries("", locked), "--private " + free},
		{"not marked", []string{locked}, publicRegistries(""),
			"if only you can read the destination, add --private " + locked},
		{"marked, and closed", []string{locked}, publicRegistries("", locked), ""},
		{"the operator allows user space", []string{free}, publicRegistries(bundle.RedistributeUserspace), ""},
	} {
		cfg := f.config(t, cache)
		cfg.Destinations, cfg.Licence, cfg.Registry = row.to, row.rule, login
		res, log, err := build(t, cfg, request("17800.0.9"))
		if row.hint == "" {
			if err != nil || res.Digest == "" || len(res.Repositories) != len(row.to) {
				t.Errorf("%s: Run = %+v, %v\n%s; want it published", row.name, res, err, log)
			}
			continue
		}
		if !fault.Is(err, fault.PublishRefused) || !strings.Contains(fault.Hint(err), row.hint) {
			t.Errorf("%s: Run = %v, hint %q; want publish-refused, hint with %q", row.name, err, fault.Hint(err), row.hint)
		}
		if done := phases(res); slices.Contains(done, "compile") {
			t.Errorf("%s: phases %q; want none after the look up", row.name, done)
		}
		for _, dest := range row.to {
			repo, err := registry.Open(dest, login(dest))
			if err != nil {
				t.Fatal(err)
			}
			if d, err := repo.Resolve(t.Context(),
				bundle.Tag(bundle.Identity{Fingerprint: res.Fingerprint, Driver: res.Driver})); !fault.Is(err, fault.NoArtifact) {
				t.Errorf("%s: %s has %s, %v; want nothing", row.name, dest, d.Digest, err)
			}
		}
	}
}
