// Command builder compiles NVIDIA's kernel modules for Container-Optimized OS kernels, proves that they fit, signs them
// and publishes them as OCI artifacts. This package only connects the packages below internal.
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
	return cli.Examples(&ucli.Command{
		Name:    "builder",
		Usage:   "compile, test, sign and publish NVIDIA drivers for COS kernels",
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
			cli.ConfigCommand(workCommand),
			emugpuCommand(),
			{
				Name: "version", Usage: "print the version",
				Action: func(_ context.Context, cmd *ucli.Command) error {
					_, err := fmt.Fprintln(cmd.Root().Writer, version)
					return err
				},
			},
		},
	}, map[string]string{
		"plan":             "plan --wish wish.yaml --to registry.example/drivers --key prebake.key",
		"wish check":       "wish check wish.yaml",
		"wish schema":      "wish schema >wish-list.schema.json",
		"keygen":           "keygen prebake.key",
		"cache trim":       "cache trim --max-size 20GiB",
		"doctor":           "doctor --to registry.example/drivers --key prebake.key",
		"inspect":          "inspect --build-id 17800.66.78",
		"cache":            "cache --output json",
		"snapshot keys":    "snapshot keys keys",
		"snapshot root":    "snapshot root --keys keys --to snapshot",
		"snapshot make":    "snapshot make --server http://127.0.0.1:8440 --keys keys --to snapshot",
		"snapshot refresh": "snapshot refresh --keys keys --to snapshot",
	})
}
