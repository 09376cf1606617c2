package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

func verifyCommand() *ucli.Command {
	return &ucli.Command{
		Name:      "verify",
		Usage:     "print the result of each trust rule for an artifact, or for the installed driver",
		ArgsUsage: "[REF]",
		Description: `REF is HOST/NAME@DIGEST, HOST/NAME:TAG or oci:FOLDER@DIGEST. Without REF, the
command verifies the installed driver with all its files. It changes nothing and
fetches no layer. It verifies for this node's COS build, or for --build-id.`,
		Flags: append(append(hostFlags(), trustFlags()...), append(
			cli.Group(groupWhat,
				cli.String("build-id", "",
					"verify for the COS build `BUILD_ID` instead of this node's COS build; works on any machine"),
				cli.String("board", "lakitu", "`BOARD` of the COS build in --build-id"),
			),
			append(cli.Group(groupResources, stateFlag()), cli.Group(groupOutput, cli.OutputFlag())...)...)...),
		Action: func(ctx context.Context, cmd *ucli.Command) (err error) {
			if cmd.Args().Len() > 1 {
				return fault.New(fault.Usage, "fetcher verify takes at most one artifact",
					"name one artifact: fetcher verify HOST/NAME@DIGEST")
			}
			a, done, err := localAgent(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			e, err := explain(ctx, cmd, a)
			if e == nil {
				return err
			}
			return errors.Join(err, cli.Print(cmd, e, func(w io.Writer) error { return printExplanation(w, e) }))
		},
	}
}

func explain(ctx context.Context, cmd *ucli.Command, a *agent.Agent) (*agent.Explanation, error) {
	if cmd.Args().Len() == 0 {
		if cmd.IsSet("build-id") {
			return nil, fault.New(fault.Usage, "--build-id has no effect when fetcher verifies the installed driver",
				"give the artifact to verify as an argument, or remove --build-id")
		}
		return a.ExplainInstalled(ctx)
	}
	var kernel target.Kernel
	if id := cmd.String("build-id"); id != "" {
		k, err := target.ParseKernel(id, cmd.String("board"))
		if err != nil {
			return nil, fault.Wrap(fault.Usage, err, "")
		}
		kernel = k
	} else {
		facts, err := a.Observe()
		if err != nil {
			return nil, fault.Wrap(fault.Of(err), err, "name the COS build: --build-id ID --board BOARD")
		}
		kernel = facts.Kernel
	}
	ref := cmd.Args().First()
	name, digest, found := strings.Cut(ref, "@")
	if !found {
		i := strings.LastIndex(ref, ":")
		if i < 0 || strings.Contains(ref[i:], "/") || strings.HasPrefix(ref, "oci:") && i == len("oci") {
			return nil, fault.New(fault.Usage, fmt.Sprintf("reference %q is not an artifact in a repository", ref),
				"give the artifact's digest or its tag: HOST/NAME@sha256:... or HOST/NAME:TAG")
		}
		name, digest = ref[:i], ref[i+1:]
	}
	repo, err := openRepository(cmd, name)
	if err != nil {
		return nil, err
	}
	d, err := repo.Resolve(ctx, digest)
	if err != nil {
		return nil, err
	}
	return a.Explain(ctx, repo, d.Digest.String(), kernel, time.Now())
}

func printExplanation(w io.Writer, e *agent.Explanation) error {
	fmt.Fprintf(w, "%-8s %s\n%-8s %s for COS %s\n", "artifact", e.Digest, "driver", e.Driver, e.Kernel)
	for _, f := range e.Findings {
		word := "yes"
		if !f.OK {
			word = "NO"
		}
		if _, err := fmt.Fprintf(w, "%-8s %s: %s\n", word, f.Rule, f.Detail); err != nil {
			return err
		}
	}
	return nil
}
