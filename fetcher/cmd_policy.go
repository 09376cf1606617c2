package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/fetcher/internal/policy"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
)

func policyCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "policy",
		Usage: "check a policy file, which says what a node may load",
		Commands: []*ucli.Command{
			{
				Name: "check", Usage: "print what a policy demands, and report its mistakes", ArgsUsage: "FILE",
				Flags: []ucli.Flag{cli.OutputFlag()},
				Action: func(_ context.Context, cmd *ucli.Command) error {
					if cmd.Args().Len() != 1 {
						return fault.New(fault.Usage, "policy check takes the name of one policy file",
							"name the file: fetcher policy check FILE")
					}
					p, err := policy.Read(cmd.Args().First())
					if err != nil {
						return err
					}
					said := policy.Summary(p)
					return cli.Print(cmd, map[string][]string{"policy": said}, func(w io.Writer) error {
						_, err := fmt.Fprintln(w, strings.Join(said, "\n"))
						return err
					})
				},
			},
			{
				Name: "schema", Usage: "print the JSON schema of a policy file, for editors",
				Action: func(_ context.Context, cmd *ucli.Command) error {
					_, err := cmd.Root().Writer.Write(policy.Schema())
					return err
				},
			},
		},
	}
}
