package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/doctor"
	"github.com/prebake/prebake/builder/internal/inspect"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// inspectCommand returns the command that checks whether a bucket has all files of a COS build that are needed to build
// a driver.
func inspectCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "inspect",
		Usage: "check whether drivers can be built for one COS build, and list what is wrong",
		Description: `inspect lists what the buckets have, fetches the files of the COS build that a
compile reads, and compiles nothing. If a build could not use a file, inspect
says what the file contains. Attach the output when you report that a COS build
does not work. The exit status is the one of the first check that fails.`,
		Flags: slices.Concat(
			cli.Group(groupWhat,
				&ucli.StringFlag{Name: "build-id", Usage: "`BUILD_ID` of the COS build, such as 17800.66.78", Required: true,
					Sources: cli.Env("build-id")},
				cli.String("board", "lakitu", "COS `BOARD`: lakitu or lakitu-arm64"),
				&ucli.BoolFlag{Name: "vmlinux", Usage: "also fetch vmlinux (hundreds of MB), and compare it with the headers"},
			),
			cli.Group(groupFrom, cli.String("kernel-mirror", kernelBucket, "`URL` of the COS release bucket"),
				cli.String("driver-mirror", driverBucket,
					"`URL` of the bucket with NVIDIA's runfiles; separate several by commas")),
			cli.Group(groupOutput, cacheFlag(), cli.OutputFlag()),
		),
		Action: runInspect,
	}
}

func runInspect(ctx context.Context, cmd *ucli.Command) (err error) {
	if cmd.Args().Present() {
		return fault.New(fault.Usage, fmt.Sprintf("unexpected argument %q", cmd.Args().First()),
			"see "+cmd.FullName()+" --help")
	}
	kernel, err := target.ParseKernel(cmd.String("build-id"), cmd.String("board"))
	if err != nil {
		return fault.Wrap(fault.Usage, err, "see builder inspect --help")
	}
	cache, err := cas.Open(cmd.String("cache"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cache.Close()) }()
	kernels, err := cosbucket.Open(ctx, cmd.String("kernel-mirror"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, kernels.Close()) }()
	report := inspect.Build(ctx, kernels, cache, kernel, inspect.Config{
		VMLinux: cmd.Bool("vmlinux"), DriverMirror: cmd.String("driver-mirror"),
		Progress: func(line string) { fmt.Fprintln(cmd.Root().ErrWriter, line) },
	})
	if err := cli.Print(cmd, report, func(w io.Writer) error {
		_, err := io.WriteString(w, reportTable(report))
		return err
	}); err != nil {
		return err
	}
	if err := report.Err(); err != nil {
		failed := 0
		for _, f := range report.Findings {
			if f.Level == doctor.Fail {
				failed++
			}
		}
		return fault.New(fault.Of(err),
			fmt.Sprintf("no driver can be built for kernel %s: %d of %d checks fail", kernel, failed, len(report.Findings)),
			"read the lines that begin with \"fail\"; if one of them is wrong, report a bug and add this whole output")
	}
	return nil
}
