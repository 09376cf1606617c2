package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/mirror"
	"github.com/prebake/prebake/builder/internal/testgpu"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// mirrorCommand makes a COS-shaped mirror out of Debian packages.
func mirrorCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "mirror",
		Usage: "make a COS-shaped mirror out of Debian's packages",
		Description: `Lays out COS and driver buckets as folders, out of packages of the machine's own
Debian archive. Needs no root, installs nothing, and leaves the machine's apt
sources as they are.`,
		Flags: slices.Concat(
			cli.Group(groupWhat,
				&ucli.StringFlag{Name: "board", Value: "lakitu", Usage: "COS `BOARD` of the builds for amd64"},
				&ucli.StringSliceFlag{Name: "arch", Value: []string{string(target.AMD64)},
					Usage: "`ARCH` is amd64 or arm64; of arm64 the oldest kernel and one driver, for board lakitu-arm64"},
				&ucli.StringSliceFlag{Name: "kernel-series", Value: []string{"6.1"},
					Usage: "kernels of this `SERIES`, 6.1 or 6.12; of 6.12 the newest, unless --kernel-abi names another"},
				&ucli.IntFlag{Name: "kernels", Value: 3,
					Usage: "how many kernels of 6.1: the oldest `N`-1 in Debian's index and the newest"},
				&ucli.IntSliceFlag{Name: "kernel-abi", Usage: "take the kernel with this ABI `NUMBER` instead, as in 47,50,56"},
				&ucli.StringSliceFlag{Name: "driver-branch",
					Usage: "drivers of this `BRANCH`, as in R535 and R550; one that Debian 12 has not is Debian 13's edition",
					DefaultText: "Debian 12's"},
				&ucli.BoolFlag{Name: "neighbour",
					Usage: "add one more release of the first branch, a close one, proprietary alone, out of Debian 13"},
				&ucli.BoolFlag{Name: "only-kernels", Usage: "leave the driver bucket out"},
				&ucli.BoolFlag{Name: "vmlinux", Usage: "add vmlinux, which --btf of other commands needs (50 MB a build)"},
				&ucli.BoolFlag{Name: "no-boot-archive",
					Usage: "leave prebake-boot.tgz out, which no COS bucket has; with --vmlinux, load tests boot that"},
				&ucli.BoolFlag{Name: "clang", Usage: "add a kernel compiled here with clang, as COS does it (minutes, once)"},
				&ucli.BoolFlag{Name: "clang-cached", Usage: "take that kernel as an earlier run compiled it, and compile none"},
				&ucli.BoolFlag{Name: "only-clang", Usage: "as --clang, without Debian's own kernels"},
			),
			cli.Group(groupFrom, &ucli.BoolFlag{Name: "refresh", Usage: "ask Debian's archive for its present package index"}),
			cli.Group(groupTo,
				&ucli.StringFlag{Name: "out", Usage: "`FOLDER` of the mirror", Required: true},
				&ucli.StringFlag{Name: "cache", Usage: "`FOLDER` for packages and finished objects",
					DefaultText: "prebake/mirror in the user's cache folder", Sources: cli.Env("mirror-cache")},
			),
			cli.Group(groupOutput, cli.OutputFlag()),
		),
		Action: runMirror,
	}
}

func runMirror(ctx context.Context, cmd *ucli.Command) (err error) {
	if cmd.Args().Present() {
		return fault.New(fault.Usage, fmt.Sprintf("unexpected argument %q", cmd.Args().First()), "see "+cmd.FullName()+" --help")
	}
	cache := cmd.String("cache")
	if cache == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return fault.Wrap(fault.Usage, err, "pass --cache")
		}
		cache = filepath.Join(user, "prebake", "mirror")
	}
	revision, err := testgpu.Revision()
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "prebake-mirror-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	var archs []target.Arch
	for _, arch := range cmd.StringSlice("arch") {
		archs = append(archs, target.Arch(arch))
	}
	start := time.Now()
	result, err := mirror.Make(ctx, mirror.Config{
		EmuGPU: func(ctx context.Context, arch target.Arch, headers, toolchain string, env map[string]string, release string) (string, error) {
			return testgpu.Compile(ctx, work, compile.Request{Headers: headers, Toolchain: toolchain, Env: env, Release: release, Arch: arch})
		}, EmuGPURevision: revision,
		Out: cmd.String("out"), Cache: cache, Board: cmd.String("board"), Archs: archs, Series: cmd.StringSlice("kernel-series"), Kernels: cmd.Int("kernels"), ABIs: cmd.IntSlice("kernel-abi"),
		Branches: cmd.StringSlice("driver-branch"), Neighbour: cmd.Bool("neighbour"),
		VMLinux: cmd.Bool("vmlinux"), NoBoot: cmd.Bool("no-boot-archive"), OnlyKernels: cmd.Bool("only-kernels"), Clang: cmd.Bool("clang"), OnlyClang: cmd.Bool("only-clang"), ClangCached: cmd.Bool("clang-cached"), Refresh: cmd.Bool("refresh"),
		Say: func(line string) {
			fmt.Fprintf(cmd.Root().ErrWriter, "%7.1f s  %s\n", time.Since(start).Seconds(), line)
		},
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.Root().ErrWriter, "%7.1f s  done: %d objects made, %d taken from the cache\n", time.Since(start).Seconds(), result.Made, result.Cached)
	return cli.Print(cmd, result, func(w io.Writer) error {
		for _, b := range result.Builds {
			if _, err := fmt.Fprintf(w, "build   %s/%s  %s  Debian %s\n", b.BuildID, b.Board, b.Release, b.DebianPackageVersion); err != nil {
				return err
			}
		}
		for _, d := range result.Drivers {
			if _, err := fmt.Fprintf(w, "driver  %s  %v\n", d.Version, d.Flavours); err != nil {
				return err
			}
		}
		return nil
	})
}
