package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/testgpu"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
	"github.com/prebake/prebake/pkg/target"
)

// emugpuCommand returns the command that compiles the kernel module of the emulated GPU. Only deploy/mirror runs this
// command, when it writes boot archives.
func emugpuCommand() *ucli.Command {
	return &ucli.Command{
		Name:   "emugpu",
		Usage:  "compile the load test's emulated GPU for one kernel",
		Hidden: true,
		Flags: []ucli.Flag{
			&ucli.BoolFlag{Name: "revision", Usage: "print the digest of the emulated GPU's source, and compile nothing"},
			&ucli.StringFlag{Name: "headers", Usage: "`FOLDER` of the kernel's headers"},
			&ucli.StringFlag{Name: "toolchain", Usage: "`FOLDER` of the unpacked toolchain"},
			&ucli.StringSliceFlag{Name: "variable", Usage: "variable `NAME=VALUE` from toolchain_env"},
			&ucli.StringFlag{Name: "release", Usage: "`RELEASE` of the kernel, as uname -r prints it"},
			&ucli.StringFlag{Name: "arch", Value: string(target.AMD64), Usage: "`ARCH` of the kernel: amd64 or arm64"},
			&ucli.StringFlag{Name: "out", Usage: "write the module to `FILE`"},
		},
		Action: func(ctx context.Context, cmd *ucli.Command) (err error) {
			revision, err := testgpu.Revision()
			if err != nil {
				return err
			}
			if cmd.Bool("revision") {
				_, err := fmt.Fprintln(cmd.Root().Writer, revision)
				return err
			}
			if err := requireFlags(cmd, "headers", "toolchain", "release", "out"); err != nil {
				return err
			}
			env := map[string]string{}
			for _, variable := range cmd.StringSlice("variable") {
				name, value, ok := strings.Cut(variable, "=")
				if !ok {
					return fault.New(fault.Usage, fmt.Sprintf("--variable %q: want NAME=VALUE", variable), "")
				}
				env[name] = value
			}
			work, err := os.MkdirTemp("", "prebake-emugpu-")
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
			made, err := testgpu.Compile(ctx, work, compile.Request{
				Headers: cmd.String("headers"), Toolchain: cmd.String("toolchain"), Env: env,
				Release: cmd.String("release"), Arch: target.Arch(cmd.String("arch")),
			})
			if err != nil {
				return err
			}
			return hostfile.Copy(cmd.String("out"), made)
		},
	}
}
