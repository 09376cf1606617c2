// Command server is Prebake's catalogue, build queue and registry in one process. This package connects the parts, and
// has the commands that call the API.
package main

import (
	"context"
	"fmt"
	"io"
	"runtime"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/cli"
)

func main() { cli.Main(program()) }

// program returns the command with all its subcommands.
func program() *ucli.Command {
	return cli.Complete(cli.Examples(&ucli.Command{
		Name:  "server",
		Usage: "keep the catalogue of kernels and drivers, queue builds, serve artifacts",
		Description: `Start it with "server serve". The other commands ask a running server (--server)
and print tables, or JSON or YAML with --output.`,
		Commands: []*ucli.Command{
			serveCommand(),
			kernelsCommand(), gpusCommand(), driversCommand(), cellsCommand(), artifactsCommand(), artifactCommand(),
			buildsCommand(), buildCommand(), resolveCommand(),
			requestCommand(), retryCommand(), watchCommand(), cancelCommand(), yankCommand(), unyankCommand(),
			releasesCommand(), releaseCommand(), announceCommand(), preflightCommand(), wishListsCommand(),
			tokensCommand(), auditCommand(),
			coverageCommand(), warningsCommand(), reportsCommand(), quarantineCommand(), liftCommand(),
			freeTagsCommand(),
			backupCommand(), reindexCommand(), importCommand(),
			cli.ConfigCommand(serveCommand),
			versionCommand(),
		},
	}, examples), complete)
}

// version is set by the linker.
var version = "devel"

func versionCommand() *ucli.Command {
	return &ucli.Command{
		Name: "version", Usage: "print the version", Flags: []ucli.Flag{cli.OutputFlag()},
		Action: func(_ context.Context, cmd *ucli.Command) error {
			v := map[string]string{"version": version, "go": runtime.Version()}
			return cli.Print(cmd, v, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "server %s (%s)\n", v["version"], v["go"])
				return err
			})
		},
	}
}
