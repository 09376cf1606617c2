// Command mirror makes folders from Debian's packages that look like a COS release bucket and COS's bucket of NVIDIA
// drivers. With them, Prebake can be tried where neither bucket can be reached. The program is not part of the product.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/deploy/internal/mirror"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// The linker sets version.
var version = "devel"

func main() { cli.Main(root()) }

// The groups of flags in help.
const (
	groupWhat   = "What to lay out"
	groupFrom   = "Where from"
	groupTo     = "Where to"
	groupOutput = "Output and advanced"
)

func root() *ucli.Command {
	return &ucli.Command{
		Name:    "mirror",
		Version: version,
		Usage:   "make a mirror from Debian's packages, in the layout of COS's buckets",
		Description: `mirror writes a COS bucket and a driver bucket as folders. The files come from
packages of the Debian archive that this machine uses. mirror needs no root,
installs nothing, and does not change the machine's apt sources.`,
		Flags: slices.Concat(
			cli.Group(groupWhat,
				&ucli.StringFlag{Name: "board", Value: "lakitu", Usage: "COS `BOARD` of the amd64 builds"},
				&ucli.StringSliceFlag{Name: "arch", Value: []string{string(target.AMD64)},
					Usage: "`ARCH` is amd64 or arm64; arm64 gets the oldest kernel and one driver, for board lakitu-arm64"},
				&ucli.StringSliceFlag{Name: "kernel-series", Value: []string{"6.1"},
					Usage: "take kernels of this `SERIES`, 6.1 or 6.12; of 6.12 only the newest, unless --kernel-abi names another"},
				&ucli.IntFlag{Name: "kernels", DefaultText: "4",
					Usage: "take `COUNT` kernels of 6.1: half of them the oldest in Debian's index, half the newest"},
				&ucli.IntSliceFlag{Name: "kernel-abi",
					Usage: "take the kernel with this ABI `NUMBER`, not those of --kernels; several as in 47,50,56"},
				&ucli.StringSliceFlag{Name: "driver-branch",
					Usage:       "take drivers of this `BRANCH`, such as R535; a branch that Debian 12 lacks comes from Debian 13",
					DefaultText: "the branch in Debian 12"},
				&ucli.BoolFlag{Name: "neighbour",
					Usage: "add from Debian 13 a second, similar release of the first branch, in the proprietary flavour only"},
				&ucli.BoolFlag{Name: "only-kernels", Usage: "make no driver bucket"},
				&ucli.BoolFlag{Name: "vmlinux", Usage: "add vmlinux, for builds with --btf (50 MB for each COS build)"},
				&ucli.BoolFlag{Name: "no-boot-archive",
					Usage: "leave out prebake-boot.tgz, which COS's bucket does not have; with --vmlinux, load tests boot vmlinux"},
				&ucli.BoolFlag{Name: "clang",
					Usage: "add a kernel that mirror compiles with clang, as COS compiles its kernels (takes minutes, once)"},
				&ucli.BoolFlag{Name: "clang-cached",
					Usage: "like --clang, but use the kernel that an earlier run compiled; compile nothing"},
				&ucli.BoolFlag{Name: "only-clang", Usage: "like --clang, but leave out Debian's own kernels"},
			),
			cli.Group(groupFrom,
				&ucli.BoolFlag{Name: "refresh", Usage: "fetch the current package index from Debian's archive"}),
			cli.Group(groupTo,
				&ucli.StringFlag{Name: "out", Usage: "`FOLDER` of the mirror", Required: true},
				&ucli.StringFlag{Name: "cache", Usage: "`FOLDER` that keeps packages and finished files for later runs",
					DefaultText: "prebake/mirror in the user's cache folder", Sources: cli.Env("mirror-cache")},
			),
			cli.Group(groupOutput,
				&ucli.StringFlag{Name: "builder", Usage: "`PROGRAM` that compiles the emulated GPU",
					DefaultText: "builder beside mirror"},
				cli.OutputFlag(),
			),
		),
		Action: runMirror,
	}
}

func runMirror(ctx context.Context, cmd *ucli.Command) (err error) {
	if cmd.Args().Present() {
		return fault.New(fault.Usage, fmt.Sprintf("unexpected argument %q", cmd.Args().First()),
			"see "+cmd.FullName()+" --help")
	}
	cache := cmd.String("cache")
	if cache == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return fault.Wrap(fault.Usage, fmt.Errorf("find the user's cache folder: %w", err), "pass --cache FOLDER")
		}
		cache = filepath.Join(user, "prebake", "mirror")
	}
	gpu := emugpu{builder: cmd.String("builder")}
	if gpu.builder == "" {
		self, err := os.Executable()
		if err != nil {
			return fault.Wrap(fault.Usage, fmt.Errorf("find the folder of this program, where builder should be: %w", err),
				"pass --builder PROGRAM")
		}
		gpu.builder = filepath.Join(filepath.Dir(self), "builder")
	}
	if gpu.work, err = os.MkdirTemp("", "prebake-mirror-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(gpu.work)) }()
	revision := ""
	if !cmd.Bool("no-boot-archive") { // the boot archive has the emulated GPU
		if revision, err = gpu.revision(ctx); err != nil {
			return err
		}
	}
	var archs []target.Arch
	for _, arch := range cmd.StringSlice("arch") {
		archs = append(archs, target.Arch(arch))
	}
	start := time.Now()
	result, err := mirror.Make(ctx, mirror.Config{
		EmuGPU: gpu.compile, EmuGPURevision: revision,
		Out: cmd.String("out"), Cache: cache, Board: cmd.String("board"), Archs: archs,
		Series: cmd.StringSlice("kernel-series"), Kernels: cmd.Int("kernels"), ABIs: cmd.IntSlice("kernel-abi"),
		Branches: cmd.StringSlice("driver-branch"), Neighbour: cmd.Bool("neighbour"),
		VMLinux: cmd.Bool("vmlinux"), NoBoot: cmd.Bool("no-boot-archive"), OnlyKernels: cmd.Bool("only-kernels"),
		Clang: cmd.Bool("clang"), OnlyClang: cmd.Bool("only-clang"), ClangCached: cmd.Bool("clang-cached"),
		Refresh: cmd.Bool("refresh"),
		Progress: func(line string) {
			fmt.Fprintf(cmd.Root().ErrWriter, "%7.1f s  %s\n", time.Since(start).Seconds(), line)
		},
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.Root().ErrWriter, "%7.1f s  done: %d objects made, %d taken from the cache\n",
		time.Since(start).Seconds(), result.Made, result.Cached)
	printed := struct {
		mirror.Result
		Made   int `json:"made"`
		Cached int `json:"cached"`
	}{result, result.Made, result.Cached}
	return cli.Print(cmd, printed, func(w io.Writer) error {
		for _, b := range result.Builds {
			if _, err := fmt.Fprintf(w, "build   %s/%s  %s  Debian %s\n", b.BuildID, b.Board, b.Release,
				b.DebianPackageVersion); err != nil {
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

// emugpu compiles the emulated GPU for boot archives, with the program builder.
type emugpu struct{ builder, work string }

func (g emugpu) run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, g.builder, append([]string{"emugpu"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fault.Wrap(fault.Usage,
			fmt.Errorf("compile the emulated GPU with the command builder: %w: %.1000s", err,
				strings.TrimSpace(stderr.String())),
			"compile builder: make build; if builder is elsewhere, pass --builder PROGRAM; if you need no boot archives, pass "+
				"--no-boot-archive")
	}
	return strings.TrimSpace(string(out)), nil
}

// revision returns the revision of the source that the builder would compile.
func (g emugpu) revision(ctx context.Context) (string, error) { return g.run(ctx, "--revision") }

func (g emugpu) compile(ctx context.Context, arch target.Arch, headers, toolchain string, env map[string]string,
	release string) (string, error) {
	dir, err := os.MkdirTemp(g.work, "emugpu-")
	if err != nil {
		return "", err
	}
	ko := filepath.Join(dir, "emugpu.ko")
	args := []string{"--headers", headers, "--toolchain", toolchain, "--release", release, "--arch", string(arch), "--out",
		ko}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		args = append(args, "--variable", name+"="+env[name])
	}
	_, err = g.run(ctx, args...)
	return ko, err
}
