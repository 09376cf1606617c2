package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/licence"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
)

func bundlePushCommand() *ucli.Command {
	return &ucli.Command{
		Name: "push", Usage: "copy a bundle's drivers to a registry, with unchanged digests and attestations",
		ArgsUsage: "FILE[+DELTA…]",
		Description: `Container images, keys and the snapshot are not copied. Use skopeo for the
images, and "builder bundle extract" for keys and snapshot. For a Prebake server
use "server import", which also records the drivers in its catalogue.

Example:
  builder bundle push drivers.tar --to registry.example/prebake/driver \
    --private registry.example/prebake`,
		Flags: slices.Concat(
			cli.Group(groupTo, cli.String("to", "", "repository `REF` to copy the drivers to, as host/name or oci:FOLDER")),
			cli.Group(groupTo, registryFlags("--to")...),
			cli.Group(groupTo, privateFlag(), redistributeFlag()),
			cli.Group(groupOutput, cli.OutputFlag()),
		),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			file, err := oneArg(cmd, "the bundle")
			if err != nil {
				return err
			}
			if err := requireFlags(cmd, "to"); err != nil {
				return err
			}
			from, err := openBundle(fileRef(file))
			if err != nil {
				return err
			}
			to, err := openWithLogin(cmd, cmd.String("to"))
			if err != nil {
				return err
			}
			all, err := pushDrivers(ctx, from, to, licenceRule(cmd))
			if err != nil {
				return err
			}
			if all == nil {
				return fault.New(fault.NoArtifact, file+" has no drivers",
					"list what the bundle has: builder bundle show "+file)
			}
			return cli.Print(cmd, all, func(w io.Writer) error {
				for _, t := range all {
					fmt.Fprintf(
						w,
						"pushed   %s\n         %s, with %d referrers\n",
						t.Tag,
						t.Digest[:len("sha256:")+12],
						t.Attached,
					)
				}
				return nil
			})
		},
	}
}

// pushDrivers copies the drivers of a bundle to a registry, if the licence rule allows every flavour there. After the
// copy, pushDrivers calls [licence.Rule.Published]: only then can it try to read the drivers without credentials
// (docs/decisions/0031).
func pushDrivers(ctx context.Context, from, to *registry.Repository, rule licence.Rule) ([]registry.Tagged, error) {
	flavours := map[string]target.Flavour{} // by digest
	err := registry.EachTagged(ctx, from, func(_ string, d v1.Descriptor, m *v1.Manifest) error {
		if m.Annotations[bundle.AnnotationFormat] == "" {
			return nil
		}
		f, err := target.ParseFlavour(m.Annotations[bundle.AnnotationDriverFlavour])
		if err != nil {
			return fault.Wrap(fault.Unverified, fmt.Errorf("read driver %s: %w", d.Digest, err),
				"get the bundle again from its publisher")
		}
		flavours[d.Digest.String()] = f
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, f := range slices.Compact(slices.Sorted(maps.Values(flavours))) {
		if err := rule.Check(ctx, to.Name(), to, f); err != nil {
			return nil, err
		}
	}
	isDriver := func(d v1.Descriptor, _ *v1.Manifest) bool { return flavours[d.Digest.String()] != "" }
	all, err := registry.CopyTagged(ctx, from, to, isDriver, nil)
	seen := map[string]bool{}
	// This check also runs after a copy that ended early, because some drivers may be in the registry already.
	for _, t := range all {
		if !seen[t.Digest] {
			seen[t.Digest] = true
			err = errors.Join(err, rule.Published(ctx, to.Name(), to, flavours[t.Digest], t.Digest))
		}
	}
	if err != nil {
		return nil, err
	}
	return all, nil
}
