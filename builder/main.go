// Command builder compiles NVIDIA's kernel modules for Container-Optimized OS
// kernels, proves that they fit, signs them and publishes them as OCI
// artifacts. This package is wiring only.
package main

import (
	"context"
	"fmt"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/cli"
)

// version is set at link time.
var version = "devel"

func main() {
	cli.Main(root())
}

func root() *ucli.Command {
	return &ucli.Command{
		Name:    "builder",
		Usage:   "compile, prove, sign and publish NVIDIA drivers for COS kernels",
		Version: version,
		Commands: []*ucli.Command{
			buildCommand(),
			workCommand(),
			planCommand(),
			wishCommand(),
			keygenCommand(),
			cacheCommand(),
			doctorCommand(),
			inspectCommand(),
			reproduceCommand(),
			snapshotCommand(),
			bundleCommand(),
			emugpuCommand(),
			{
				Name: "version", Usage: "print the version",
				Action: func(_ context.Context, cmd *ucli.Command) error {
					_, err := fmt.Fprintln(cmd.Root().Writer, version)
					return err
				},
			},
		},
	}
}
