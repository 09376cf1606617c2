package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/login"
	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// These constants are the headings under which --help lists the settings.
const (
	groupWhat      = cli.What
	groupFrom      = cli.From
	groupTo        = cli.To
	groupTrust     = cli.Trust
	groupResources = cli.Resources
	groupOutput    = cli.Advanced
)

const (
	kernelBucket = "gs://cos-tools"
	driverBucket = "gs://cos-nvidia-gpu-drivers"
	builderID    = "https://prebake.dev/builder/local"
)

// mirrorFlags returns the flags for the buckets of kernels and of drivers.
func mirrorFlags() []ucli.Flag {
	return cli.Group(groupFrom,
		cli.String("kernel-mirror", kernelBucket,
			"`URL` of COS's release bucket: gs://, https:// or file://; separate several by commas"),
		cli.String("driver-mirror", driverBucket, "`URL` of the bucket with NVIDIA's runfiles; separate several by commas"),
	)
}

// pipelineFlags returns the flags that the commands build and work share.
func pipelineFlags() []ucli.Flag {
	googleSignatures := cli.Choice("google-signatures", pipeline.GoogleAuto,
		"attach Google's signatures to the modules: `MODE` is auto (if they fit), require or off",
		pipeline.GoogleAuto, pipeline.GoogleRequire, pipeline.GoogleOff)
	loadTest := cli.Choice("load-test", pipeline.LoadTestAuto,
		"run the load test: `MODE` is auto (if the kernel can be booted), require or off",
		pipeline.LoadTestAuto, pipeline.LoadTestRequire, pipeline.LoadTestOff)
	return slices.Concat(
		cli.Group(groupWhat,
			cli.Bool("google-modules", "publish Google's prebuilt open modules; compile nothing"),
			cli.Bool("debug-symbols", "also publish the modules' debug information"),
			cli.Bool("btf", "add BTF types for tracing; needs pahole and vmlinux"),
			cli.Range("max-age", 0, 0, 36500, "rebuild published artifacts that are older than `DAYS`"),
		),
		mirrorFlags(),
		cli.Group(groupTo,
			cli.Strings("to",
				"publish to `REF`: host/repository, oci:FOLDER, or a bucket"),
			cli.String("username", "", "user `NAME` for the first registry (default: from Docker)"),
			cli.String("password", "", "`PASSWORD` or token for the first registry in --to"),
			privateFlag(), redistributeFlag(),
			cli.Bool("with-runfile", "also copy NVIDIA's runfile to each bucket in --to"),
			cli.Range("deltas", 3, 0, 1000, "attach deltas from `COUNT` earlier COS builds"),
		),
		cli.Group(groupTrust,
			cli.String("key", "", "signing `KEY`: file, KMS URI or keyless:SIGNING_CONFIG"),
			identityTokenFlag(),
			cli.TrustedRootFlag(),
			cli.String("module-key", "", "RSA `KEY` that signs modules: a file or a KMS URI"),
			cli.String("module-cert", "",
				"`FILE` with the certificate of --module-key, or of Google's key for --google-modules"),
			googleSignatures,
			cli.String("builder-id", builderID, "`URI` that names this builder in the provenance"),
		),
		cli.Group(groupTrust, loadTest),
		programFlags(),
		cli.Group(groupResources,
			cacheFlag(),
			cacheSizeFlag(),
			cli.Range("jobs", 0, 0, 10_000, "run `COUNT` compilers per cell; 0: cells share all CPUs"),
			cli.Duration("compile-timeout", 45*time.Minute, "stop a compile after `TIME`"),
		),
	)
}

func defaultCache() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = os.TempDir()
	}
	return filepath.Join(dir, "prebake", "build")
}

// programFlags returns the flags with the paths of the load test's programs.
func programFlags() []ucli.Flag {
	guestinit := cli.String("guestinit", programBeside("guestinit"), "the load test's init `PROGRAM`")
	probe := cli.String("probe", programBeside("nvmlprobe"), "the load test's `PROGRAM` that queries NVML")
	guestinit.DefaultText, probe.DefaultText = "beside builder", "nvmlprobe beside builder"
	return cli.Group(groupOutput, guestinit, probe)
}

// programBeside returns the path of the named program in the folder of the running program.
func programBeside(name string) string {
	self, err := os.Executable()
	if err != nil {
		return name
	}
	return filepath.Join(filepath.Dir(self), name)
}

// requireFlags returns an error that lists the given flags without a value.
func requireFlags(cmd *ucli.Command, names ...string) error {
	var none []string
	for _, name := range names {
		if list, ok := cmd.Value(name).([]string); cmd.String(name) == "" && (!ok || len(list) == 0) {
			none = append(none, "--"+name)
		}
	}
	if len(none) == 0 {
		return nil
	}
	return fault.New(fault.Usage, "missing: "+strings.Join(none, ", "), "see "+cmd.FullName()+" --help")
}

// refuseFlags returns an error if any of the named flags is set. The error says that the flag has no effect with the
// given setting.
func refuseFlags(cmd *ucli.Command, setting string, names ...string) error {
	for _, name := range names {
		if cmd.IsSet(name) {
			return cli.About(fault.New(fault.Usage, fmt.Sprintf("--%s has no effect with %s", name, setting),
				"leave out --"+name+"; see "+cmd.FullName()+" --help"), name)
		}
	}
	return nil
}

// oneSignature refuses settings that would sign modules twice. It also refuses --module-key without --module-cert, and
// the reverse. With --google-modules, it also refuses settings that affect only a compilation.
func oneSignature(cmd *ucli.Command) error {
	if cmd.Bool("google-modules") {
		return refuseFlags(cmd, "--google-modules", "module-key", "google-signatures", "debug-symbols", "btf")
	}
	if (cmd.String("module-key") == "") != (cmd.String("module-cert") == "") {
		return cli.About(fault.New(fault.Usage, "--module-key and --module-cert go together",
			"give both flags, or neither of them; see "+cmd.FullName()+" --help"), "module-key", "module-cert")
	}
	if cmd.String("google-signatures") == string(pipeline.GoogleRequire) {
		return refuseFlags(cmd, "--google-signatures require", "module-key")
	}
	return nil
}

func pipelineConfig(cmd *ucli.Command) (pipeline.Config, error) {
	if err := requireFlags(cmd, "to", "key"); err != nil {
		return pipeline.Config{}, err
	}
	if err := oneSignature(cmd); err != nil {
		return pipeline.Config{}, err
	}
	keys, err := keyOptions(cmd)
	if err != nil {
		return pipeline.Config{}, err
	}
	cache, err := cas.Open(cmd.String("cache"))
	if err != nil {
		return pipeline.Config{}, fmt.Errorf("open cache: %w", err)
	}
	to := cmd.StringSlice("to")
	return pipeline.Config{
		Licence:      licenceRule(cmd),
		KernelMirror: cmd.String("kernel-mirror"), DriverMirror: cmd.String("driver-mirror"),
		Cache: cache, Destinations: to, Key: cmd.String("key"), ModuleKey: cmd.String("module-key"),
		ModuleCert: cmd.String("module-cert"), GoogleSignatures: pipeline.GoogleSignatures(cmd.String("google-signatures")),
		GoogleModules: cmd.Bool("google-modules"), DebugSymbols: cmd.Bool("debug-symbols"), BTF: cmd.Bool("btf"),
		WithRunfile: cmd.Bool("with-runfile"), Deltas: cmd.Int("deltas"), BuilderID: cmd.String("builder-id"),
		Version:      version,
		RebuildAfter: time.Duration(cmd.Int("max-age")) * 24 * time.Hour,
		Registry:     credentials(cmd, to), KeyOptions: keys,
		Jobs: cmd.Int("jobs"), LoadTest: pipeline.LoadTest(cmd.String("load-test")),
		GuestInit: cmd.String("guestinit"), NVMLProbe: cmd.String("probe"), CompileTimeout: cmd.Duration("compile-timeout"),
	}, nil
}

// credentials returns a function that returns the registry options of a destination. --username and --password apply
// only to the first destination that is not a bucket (see [tarball.Is]).
func credentials(cmd *ucli.Command, destinations []string) func(destination string) registry.Options {
	first := slices.IndexFunc(destinations, func(destination string) bool { return !tarball.Is(destination) })
	return func(destination string) registry.Options {
		o := registry.Options{UserAgent: "prebake-builder/" + version, Keychain: login.Keychain()}
		if first >= 0 && destination == destinations[first] {
			o.Username, o.Password = cmd.String("username"), cmd.String("password")
		}
		return o
	}
}

func buildCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "build",
		Usage: "build one cell (kernel and driver), or all cells of a wish list",
		Description: `Give --build-id for one cell, or --wish for many. Always give --to and --key.
With --wish, the wish list replaces --board, --driver, --flavour and --label.

  builder build --build-id 17800.66.78 --driver R535 \
    --to registry.example/drivers --private registry.example --key prebake.key
  builder build --wish wish.yaml --to gs://my-bucket/cos \
    --private gs://my-bucket --key prebake.key`,
		Flags: slices.Concat(
			cli.Group(groupWhat,
				wishFlag(),
				cli.String("build-id", "", "`BUILD_ID` of the COS build, such as 17800.66.78"),
				cli.String("board", "lakitu", "COS `BOARD`: lakitu or lakitu-arm64"),
				cli.String("driver", string(target.Default),
					"`VERSION`; or branch (R535), latest or default, each also per GPU: R535@NVIDIA_L4"),
				cli.String("flavour", string(target.Proprietary), "`FLAVOUR`: proprietary or open"),
			),
			pipelineFlags(),
			wishFlags(),
			cli.Group(groupTo, cli.Strings("label",
				"in buckets, set `LABEL` (DEFAULT, LATEST or the branch) on this driver; needs --flavour open")),
			cli.Group(groupOutput,
				cli.WasCalled(cli.String("log-file", "", "`FILE` for the full log (default: in the cache folder)"), "log"),
				cli.Bool("dry-run", "with --wish: print what would be built; build nothing"),
				cli.OutputFlag(),
			),
		),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := oneOf(cmd, "wish", "build-id"); err != nil {
				return err
			}
			if cmd.String("wish") != "" {
				if err := refuseFlags(cmd, "--wish", "board", "driver", "flavour", "label", "log-file"); err != nil {
					return err
				}
				return runBuildWish(ctx, cmd)
			}
			if err := refuseFlags(cmd, "--build-id", "attempts", "dry-run", "parallel", "retry-failed"); err != nil {
				return err
			}
			return runBuild(ctx, cmd)
		},
	}
}

func runBuild(ctx context.Context, cmd *ucli.Command) (err error) {
	kernel, err := target.ParseKernel(cmd.String("build-id"), cmd.String("board"))
	if err != nil {
		return fault.Wrap(fault.Usage, err, "see builder build --help")
	}
	wish, err := target.ParseGPUWish(cmd.String("driver"))
	if err != nil {
		return fault.Wrap(fault.Usage, err, "see builder build --help")
	}
	flavour, err := target.ParseFlavour(cmd.String("flavour"))
	if err != nil {
		return fault.Wrap(fault.Usage, err, "see builder build --help")
	}
	labels, err := labelsOf(cmd, flavour)
	if err != nil {
		return err
	}
	cfg, err := pipelineConfig(cmd)
	if err != nil {
		return err
	}
	cfg.Labels, cfg.RetrySince = labels, time.Now() // a user who names a cell wants a new attempt
	defer func() { err = errors.Join(err, cfg.Cache.Close()) }()
	if err := checkPlaces(ctx, cfg); err != nil {
		return err
	}
	logPath := cmd.String("log-file")
	if logPath == "" {
		logPath = filepath.Join(cfg.Cache.Dir(), "logs",
			fmt.Sprintf("%s-%s-%s-%s.log", kernel.BuildID, kernel.Board, wish, flavour))
	}
	if err := os.MkdirAll(filepath.Dir(logPath), 0o755); err != nil {
		return err
	}
	log, err := os.Create(logPath)
	if err != nil {
		return fault.Disk(fmt.Errorf("open the log of the build: %w", err), "free space on the disk of the log")
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	stderr := cmd.Root().ErrWriter
	fmt.Fprintf(stderr, "building %s %s for %s; full log in %s\n", wish, flavour, kernel, logPath)
	cfg.Cache.Notify = func(text string) { fmt.Fprintln(io.MultiWriter(stderr, log), text) }
	line := &timeline.Run{Watch: cli.Progress(stderr)}
	res, err := pipeline.Run(ctx, cfg,
		pipeline.Request{BuildID: kernel.BuildID, Board: kernel.Board, Driver: wish, Flavour: flavour}, log, line)
	if err != nil {
		fmt.Fprintf(stderr, "full log: %s\n", logPath)
		if kerr := keepFailure(ctx, cfg, res, err); kerr != nil {
			fmt.Fprintf(stderr, "could not record this failure in the cache: %v\n", kerr)
		}
		return err
	}
	if _, err := trimCache(ctx, cmd, cfg.Cache); err != nil {
		return err
	}
	return cli.Print(cmd, res, func(w io.Writer) error { return printResult(w, res) })
}

func printResult(w io.Writer, res *pipeline.Result) error {
	for _, repo := range res.Repositories {
		if _, err := fmt.Fprintf(w, "%s@%s\n", repo, res.Digest); err != nil {
			return err
		}
	}
	var unsigned []string
	for _, t := range res.Tarballs {
		unsigned = append(unsigned, t.Unsigned...)
		if _, err := fmt.Fprintln(w, t.URL); err != nil {
			return err
		}
	}
	for _, l := range res.Labels {
		unsigned = append(unsigned, l.Unsigned...)
		for _, label := range slices.Sorted(maps.Keys(l.Labels)) {
			if _, err := fmt.Fprintf(w, "label     %s is %s in %s\n", label, l.Labels[label], l.URL); err != nil {
				return err
			}
		}
	}
	slices.Sort(unsigned)
	for _, url := range slices.Compact(unsigned) {
		if _, err := fmt.Fprintf(w, "unsigned  %s: other writers wrote a part of this object\n", url); err != nil {
			return err
		}
	}
	verdict := "static checks only"
	switch {
	case res.LoadTest != nil:
		verdict = res.LoadTest.State
	case res.Reused:
		verdict = "not run now: this artifact was published before"
	}
	_, err := fmt.Fprintf(w, "tag       %s\ndriver    %s\nkernel    %s, release %s\nABI       %s\nload test %s\n",
		res.Tag, res.Driver, res.Kernel, res.Kernel.Release, res.Fingerprint, verdict)
	return err
}

func keygenCommand() *ucli.Command {
	return &ucli.Command{
		Name:      "keygen",
		Usage:     "make a signing key in FILE, and its public key in FILE.pub",
		ArgsUsage: "FILE",
		Action: func(_ context.Context, cmd *ucli.Command) error {
			path := cmd.Args().First()
			if path == "" || cmd.Args().Len() != 1 {
				return fault.New(fault.Usage, "builder keygen takes one file name", "run: builder keygen prebake.key")
			}
			if err := sign.GenerateKey(path); err != nil {
				return err
			}
			_, err := fmt.Fprintf(cmd.Root().Writer, "%s\n%s.pub\n", path, path)
			return err
		},
	}
}
