// Command fetcher finds, verifies and installs the NVIDIA driver that a Container-Optimized OS node should run. The
// program is static, holds no private key, and contains no SQL and no C code. This package is wiring only.
package main

import (
	"context"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/fetcher/internal/cosinstaller"
	"github.com/prebake/prebake/fetcher/internal/localbuild"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
)

// version is the program's version. The linker sets it.
var version = "devel"

func main() {
	if len(os.Args) > 1 && os.Args[1] == localbuild.EnterCommand { // localbuild started this program as its child
		err := localbuild.Enter(os.Args[2:])
		cli.PrintError(os.Stderr, err)
		os.Exit(fault.Of(err).ExitCode())
	}
	if os.Getenv("GOGC") == "" {
		// Most of the live heap, some 17 MB, is the decompression windows of two layers. On a node, memory is worth more than
		// CPU time.
		debug.SetGCPercent(10)
	}
	if cosinstaller.Recognise(os.Args) {
		args, notes, err := cosinstaller.Translate(os.Args[1:], os.Getenv)
		if err != nil {
			cli.PrintError(os.Stderr, err)
			os.Exit(fault.Of(err).ExitCode())
		}
		for _, note := range notes {
			fmt.Fprintln(os.Stderr, cosinstaller.Name+": "+note)
		}
		os.Args = append([]string{"fetcher"}, args...)
	}
	cli.Main(root())
}

func root() *ucli.Command {
	return cli.Examples(&ucli.Command{
		Name:        "fetcher",
		Usage:       "find, verify, install and load the NVIDIA driver made for this COS node",
		Version:     version,
		Description: exitCodes(),
		Commands: []*ucli.Command{
			runCommand(),
			installCommand(),
			resolveCommand(),
			statusCommand(),
			rollbackCommand(),
			historyCommand(),
			uninstallCommand(),
			bootCommand(),
			verifyCommand(),
			policyCommand(),
			cli.ConfigCommand(runCommand),
			{
				Name: "version", Usage: "print the version",
				Action: func(_ context.Context, cmd *ucli.Command) error {
					_, err := fmt.Fprintln(cmd.Root().Writer, version)
					return err
				},
			},
		},
	}, map[string]string{
		"resolve":       "resolve --server https://prebake.example",
		"status":        "status --output json",
		"rollback":      "rollback --dry-run",
		"history":       "history",
		"uninstall":     "uninstall --dry-run",
		"boot status":   "boot status",
		"boot undo":     "boot undo",
		"verify":        "verify registry.example/drivers@sha256:DIGEST --public-key keys.pem",
		"policy check":  "policy check policy.yaml",
		"policy schema": "policy schema >policy.schema.json",
	})
}

// exitCodes returns the help text about exit statuses. Package fault has the list.
func exitCodes() string {
	var b strings.Builder
	b.WriteString("Exit status:\n   0  done; the driver is ready, or staged as requested\n")
	for _, k := range fault.Kinds() {
		fmt.Fprintf(&b, "  %2d  %s\n", k.ExitCode(), k.What())
	}
	b.WriteString("Codes from 20 on come from a builder that compiles on this node.")
	return b.String()
}
