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
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// pipelineFlags are the settings that build and work share.
func pipelineFlags() []ucli.Flag {
	return []ucli.Flag{
		&ucli.StringFlag{Name: "kernel-mirror", Value: "gs://cos-tools", Usage: "`URL` of the COS release bucket: gs://, https:// or file://; several mirrors of it with commas", Sources: cli.Env("kernel-mirror")},
		&ucli.StringFlag{Name: "driver-mirror", Value: "gs://cos-nvidia-gpu-drivers", Usage: "`URL` of the bucket with NVIDIA's runfiles; several mirrors of it with commas", Sources: cli.Env("driver-mirror")},
		&ucli.StringSliceFlag{Name: "to", Usage: "publish to `REF`: host/repository, oci:FOLDER, or gs://BUCKET/PREFIX or file://FOLDER for tarballs; may be given more than once", Sources: cli.Env("to")},
		&ucli.StringFlag{Name: "username", Usage: "user `NAME` for the first --to; all others take the Docker configuration", Sources: cli.Env("username")},
		&ucli.StringFlag{Name: "password", Usage: "`PASSWORD` or token for the first --to", Sources: cli.Env("password")},
		&ucli.StringFlag{Name: "key", Usage: "private signing key: `FILE` (see keygen), KMS URI, or keyless: and a file with a Sigstore signing configuration", Sources: cli.Env("key")},
		identityTokenFlag(),
		cli.TrustedRootFlag(),
		&ucli.StringFlag{Name: "module-key", Usage: "sign modules for the kernel with this RSA key: `FILE` or KMS URI", Sources: cli.Env("module-key")},
		&ucli.StringFlag{Name: "module-cert", Usage: "`FILE` with the certificate of --module-key, or for --google-modules, that the kernel trusts", Sources: cli.Env("module-cert")},
		&ucli.BoolFlag{Name: "google-modules", Usage: "publish the open modules that Google compiled and signed for the COS build, untouched", Sources: cli.Env("google-modules")},
		&ucli.StringFlag{Name: "google-signatures", Value: string(pipeline.GoogleAuto), Usage: "attach Google's module signatures where the COS build ships some and they hold: auto, require or off", Sources: cli.Env("google-signatures"),
			Validator: mode("google-signatures", pipeline.GoogleAuto, pipeline.GoogleRequire, pipeline.GoogleOff)},
		&ucli.BoolFlag{Name: "debug-symbols", Usage: "publish the modules' debug information beside the artifact", Sources: cli.Env("debug-symbols")},
		&ucli.BoolFlag{Name: "btf", Usage: "describe the modules' types for tracers such as bpftrace, where the kernel takes that; needs the bucket's vmlinux, and pahole", Sources: cli.Env("btf")},
		&ucli.BoolFlag{Name: "with-runfile", Usage: "copy NVIDIA's runfile into buckets among --to as well", Sources: cli.Env("with-runfile")},
		&ucli.StringFlag{Name: "builder-id", Value: "https://prebake.dev/builder/local", Usage: "`URI` that the provenance names as the builder", Sources: cli.Env("builder-id")},
		cacheFlag(),
		cacheSizeFlag(),
		&ucli.IntFlag{Name: "jobs", Usage: "parallel compiler `COUNT`, of each cell; 0 divides the processors", Sources: cli.Env("jobs")},
		&ucli.DurationFlag{Name: "compile-timeout", Value: 45 * time.Minute, Usage: "longest `TIME` for one compile; a build from the queue has one hour in all", Sources: cli.Env("compile-timeout")},
		&ucli.StringFlag{Name: "load-test", Value: string(pipeline.LoadTestAuto), Usage: "load the modules in a virtual machine: auto, require or off", Sources: cli.Env("load-test"),
			Validator: mode("load-test", pipeline.LoadTestAuto, pipeline.LoadTestRequire, pipeline.LoadTestOff)},
		&ucli.StringFlag{Name: "guestinit", Value: sibling("guestinit"), Usage: "`PROGRAM` that runs the virtual machine from inside", Sources: cli.Env("guestinit")},
		&ucli.StringFlag{Name: "probe", Value: sibling("nvmlprobe"), Usage: "`PROGRAM` that asks NVML in the virtual machine", Sources: cli.Env("probe")},
	}
}

// mode refuses a flag's value that is none of the three that such flags have.
func mode[T ~string](flag string, auto, require, off T) func(string) error {
	return func(s string) error {
		switch T(s) {
		case auto, require, off:
			return nil
		}
		return fmt.Errorf("%s %q: want %s, %s or %s", flag, s, auto, require, off)
	}
}

func defaultCache() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = os.TempDir()
	}
	return filepath.Join(dir, "prebake", "build")
}

// sibling names a program beside this one.
func sibling(name string) string {
	self, err := os.Executable()
	if err != nil {
		return name
	}
	return filepath.Join(filepath.Dir(self), name)
}

// missing returns an error that names the flags of these that nobody set.
func missing(cmd *ucli.Command, names ...string) error {
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

// alien refuses flags that mean nothing beside the one that was given.
func alien(cmd *ucli.Command, beside string, names ...string) error {
	for _, name := range names {
		if cmd.IsSet(name) {
			return fault.New(fault.Usage, fmt.Sprintf("--%s means nothing with %s", name, beside), "leave it out; see "+cmd.FullName()+" --help")
		}
	}
	return nil
}

// oneSignature refuses settings that would have modules signed twice, or that
// mean nothing for modules which somebody else made.
func oneSignature(cmd *ucli.Command) error {
	if cmd.Bool("google-modules") {
		return alien(cmd, "--google-modules", "module-key", "google-signatures", "debug-symbols", "btf")
	}
	if (cmd.String("module-key") == "") != (cmd.String("module-cert") == "") {
		return fault.New(fault.Usage, "--module-key and --module-cert go together", "see "+cmd.FullName()+" --help")
	}
	if cmd.String("google-signatures") == string(pipeline.GoogleRequire) {
		return alien(cmd, "--google-signatures require", "module-key")
	}
	return nil
}

func pipelineConfig(cmd *ucli.Command) (pipeline.Config, error) {
	if err := missing(cmd, "to", "key"); err != nil {
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
	credentials := func(destination string) registry.Options {
		o := registry.Options{UserAgent: "prebake-builder/" + version, Keychain: login.Keychain()}
		if destination == to[0] {
			o.Username, o.Password = cmd.String("username"), cmd.String("password")
		}
		return o
	}
	return pipeline.Config{
		KernelMirror: cmd.String("kernel-mirror"), DriverMirror: cmd.String("driver-mirror"),
		Cache: cache, Destinations: to, Key: cmd.String("key"), ModuleKey: cmd.String("module-key"), ModuleCert: cmd.String("module-cert"), GoogleSignatures: pipeline.GoogleSignatures(cmd.String("google-signatures")), GoogleModules: cmd.Bool("google-modules"), DebugSymbols: cmd.Bool("debug-symbols"), BTF: cmd.Bool("btf"), WithRunfile: cmd.Bool("with-runfile"), BuilderID: cmd.String("builder-id"), Version: version,
		Registry: credentials, KeyOptions: keys,
		Jobs: cmd.Int("jobs"), LoadTest: pipeline.LoadTest(cmd.String("load-test")),
		GuestInit: cmd.String("guestinit"), NVMLProbe: cmd.String("probe"), CompileTimeout: cmd.Duration("compile-timeout"),
	}, nil
}

func buildCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "build",
		Usage: "make one cell (one COS build's kernel and one driver), or all cells of a wish list",
		Flags: slices.Concat([]ucli.Flag{
			&ucli.StringFlag{Name: "build-id", Usage: "COS `BUILD_ID`, such as 17800.66.78", Sources: cli.Env("build-id")},
			&ucli.StringFlag{Name: "board", Value: "lakitu", Usage: "COS `BOARD`: lakitu or lakitu-arm64", Sources: cli.Env("board")},
			&ucli.StringFlag{Name: "driver", Value: string(target.Default), Usage: "default, latest, a branch such as R535 (each also for one GPU type, as in default@NVIDIA_L4), or a `VERSION`", Sources: cli.Env("driver")},
			&ucli.StringFlag{Name: "flavour", Value: string(target.Proprietary), Usage: "proprietary or open", Sources: cli.Env("flavour")},
			&ucli.StringFlag{Name: "log", Usage: "keep the full log in `FILE`; default: in the cache folder, its path is printed", Sources: cli.Env("log")},
			&ucli.StringSliceFlag{Name: "label", Usage: "call this driver `LABEL` in buckets among --to: DEFAULT, LATEST or its branch; may be given more than once", Sources: cli.Env("label")},
			&ucli.BoolFlag{Name: "dry-run", Usage: "with --wish: print what would be made, and make nothing", Sources: cli.Env("dry-run")},
			cli.OutputFlag(),
		}, wishFlags(), pipelineFlags()),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := oneOf(cmd, "wish", "build-id"); err != nil {
				return err
			}
			if cmd.String("wish") != "" {
				if err := alien(cmd, "--wish", "board", "driver", "flavour", "label", "log"); err != nil {
					return err
				}
				return runBuildWish(ctx, cmd)
			}
			if err := alien(cmd, "--build-id", "dry-run", "parallel", "retry-failed"); err != nil {
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
	cfg.Labels = labels
	defer func() { err = errors.Join(err, cfg.Cache.Close()) }()
	logPath := cmd.String("log")
	if logPath == "" {
		logPath = filepath.Join(cfg.Cache.Dir(), "logs", fmt.Sprintf("%s-%s-%s-%s.log", kernel.BuildID, kernel.Board, wish, flavour))
	}
	if err := os.MkdirAll(filepath.Dir(logPath), 0o755); err != nil {
		return err
	}
	log, err := os.Create(logPath)
	if err != nil {
		return fault.Disk(fmt.Errorf("open log: %w", err), "free space for logs")
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	stderr := cmd.Root().ErrWriter
	fmt.Fprintf(stderr, "building %s %s for %s; full log in %s\n", wish, flavour, kernel, logPath)
	cfg.Cache.Say = func(text string) { fmt.Fprintln(io.MultiWriter(stderr, log), text) }
	line := &timeline.Run{Watch: cli.Progress(stderr)}
	res, err := pipeline.Run(ctx, cfg, pipeline.Request{BuildID: kernel.BuildID, Board: kernel.Board, Driver: wish, Flavour: flavour}, log, line)
	if err != nil {
		fmt.Fprintf(stderr, "full log: %s\n", logPath)
		if kerr := keepFailure(ctx, cfg, res, err); kerr != nil {
			fmt.Fprintf(stderr, "failure not remembered: %v\n", kerr)
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
	for _, t := range res.Twins {
		if _, err := fmt.Fprintln(w, t.URL); err != nil {
			return err
		}
	}
	for _, l := range res.Labels {
		for _, label := range slices.Sorted(maps.Keys(l.Labels)) {
			if _, err := fmt.Fprintf(w, "label     %s is %s in %s\n", label, l.Labels[label], l.URL); err != nil {
				return err
			}
		}
	}
	verdict := "static checks only"
	switch {
	case res.LoadTest != nil:
		verdict = res.LoadTest.State
	case res.Reused:
		verdict = "as published already: nothing was made anew"
	}
	_, err := fmt.Fprintf(w, "tag       %s\ndriver    %s\nkernel    %s, release %s\nABI       %s\nload test %s\n",
		res.Tag, res.Driver, res.Kernel, res.Kernel.Release, res.Fingerprint, verdict)
	return err
}

func keygenCommand() *ucli.Command {
	return &ucli.Command{
		Name:      "keygen",
		Usage:     "make a signing key (ECDSA P-256) in FILE and its public half in FILE.pub",
		ArgsUsage: "FILE",
		Action: func(_ context.Context, cmd *ucli.Command) error {
			path := cmd.Args().First()
			if path == "" || cmd.Args().Len() != 1 {
				return fault.New(fault.Usage, "keygen takes one file name", "builder keygen prebake.key")
			}
			if err := sign.GenerateKey(path); err != nil {
				return err
			}
			_, err := fmt.Fprintf(cmd.Root().Writer, "%s\n%s.pub\n", path, path)
			return err
		},
	}
}
