package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// These are the headings under which --help lists the settings.
const (
	groupWhat      = cli.What
	groupFrom      = cli.From
	groupTo        = cli.To
	groupTrust     = cli.Trust
	groupResources = cli.Resources
	groupOutput    = cli.Advanced
)

// hostFlags are the flags that locate the node's root and the install folder.
func hostFlags() []ucli.Flag {
	root := cli.String("host-root", "/", "`FOLDER` where the node's root is mounted")
	install := cli.String("install-dir", "/home/kubernetes/bin/nvidia",
		"`FOLDER` for the driver, as a path on the node")
	root.Validator, install.Validator = absolute, absolute
	return cli.Group(groupTo, root, install)
}

// wishFlags are the flags for the wanted driver and for the sources to ask.
func wishFlags() []ucli.Flag {
	return slices.Concat(
		cli.Group(groupWhat,
			cli.String("driver", string(target.Default),
				"`VERSION` or digest; or branch (R535), latest or default, each also per GPU: R535@NVIDIA_L4"),
			cli.String("flavour", resolve.Auto,
				"driver `FLAVOUR`: proprietary, open, or auto (open if it supports this node's GPUs)"),
		),
		cli.Group(groupFrom,
			cli.String("server", "", "`URL` of the Prebake server to ask"),
			cli.Strings("registry", "repository `REF` to try after the server: host/name, oci:FOLDER or oci-archive:FILE"),
			cli.String("token-file", "", "`FILE` with a token, to ask the server for builds"),
			cli.Bool("allow-downgrade", "accept a driver that is older than the installed driver"),
			cli.WasCalled(cli.Duration("wait-build", 0, "wait at most `TIME` for a build or an unreachable service"), "wait"),
		),
	)
}

func probeFlag() ucli.Flag {
	probe := cli.String("probe", programBeside("nvmlprobe"), "`PROGRAM` to query NVML")
	probe.DefaultText = "nvmlprobe beside fetcher"
	return probe
}

// changeFlags are the flags of commands that change the node.
func changeFlags() []ucli.Flag {
	foreign := cli.Choice("foreign", "keep", "foreign driver: `MODE` is keep or replace", "keep", "replace")
	maintenance := cli.String(
		"maintenance",
		"any",
		"`HOURS` (UTC) in which a loaded driver may be replaced, such as 02:00-05:00; also any or never",
	)
	maintenance.Validator = func(s string) error {
		_, err := agent.ParseWindow(s)
		return err
	}
	return slices.Concat(
		cli.Group(groupTo,
			foreign,
			maintenance,
			cli.Duration("wait-idle", 0, "wait at most `TIME` for idle GPUs before a driver change"),
			cli.Bool("persistence", "keep GPUs initialised while no program uses them"),
			cli.Bool("edit-boot", "if necessary, edit the kernel command line and reboot"),
			cli.Bool("no-load", "make the driver active on the disk, but load no module"),
			cli.Bool("no-cuda-check", "do not check that CUDA programs can start"),
			cli.Strings("module-param", "`PARAM` such as nvidia.NVreg_NAME=1"),
		),
		cli.Group(groupOutput,
			probeFlag(),
			cli.Bool("dry-run", "print what would be done, and change nothing"),
			cli.OutputFlag(),
		),
	)
}

// installFlags are the flags of the commands install and run.
func installFlags() []ucli.Flag {
	builder := cli.String(
		"builder",
		"",
		"builder `PROGRAM` or image (HOST/NAME@DIGEST) to compile on this node; or \"never\"",
	)
	builder.DefaultText = "builder beside fetcher"
	cache := cli.String("cache", "", "`FOLDER` of the cache")
	cache.DefaultText = "cache in --state-dir"
	return slices.Concat(
		wishFlags(),
		hostFlags(),
		trustFlags(),
		cli.Group(groupFrom,
			builder,
			cli.String("kernel-mirror", "", "`URL` of the COS release bucket, for compiling on this node"),
			cli.String("driver-mirror", "", "`URL` of the bucket of runfiles, for compiling on this node"),
		),
		cli.Group(groupResources, stateFlag(), cache),
		changeFlags(),
		reportFlag(),
		cli.Group(groupOutput, cli.LogFlags()...),
	)
}

// trustFlags are the flags for the trusted signers.
func trustFlags() []ucli.Flag {
	loadTest := cli.WasCalled(cli.String("load-test-policy", "any",
		"which artifacts to accept: `MODE` is tested (only those that passed a load test) or any"), "load-test")
	loadTest.Validator = func(s string) error {
		_, err := trust.ParseLoadTestPolicy(s)
		return err
	}
	return slices.Concat(
		cli.Group(groupTrust,
			cli.String("policy", "",
				"use a policy `FILE` in place of the other trust flags"),
			cli.WasCalled(cli.String("public-key", defaultKeys,
				"`FILE` with the trusted public keys (PEM)"), "key"),
			loadTest,
		),
		cli.Group(groupTrust, cli.TrustFlags()...),
	)
}

func stateFlag() ucli.Flag {
	state := cli.String("state-dir", "/var/lib/prebake",
		"`FOLDER` on the node for the drivers that the node compiled and their signing key")
	state.Validator = absolute
	return state
}

// defaultKeys is the default path of the file with the trusted public keys.
const defaultKeys = "/etc/prebake/keys.pem"

func absolute(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("folder %q: want an absolute path", path)
	}
	return nil
}

// programBeside returns the path of a program in the folder of this program.
func programBeside(name string) string {
	self, err := os.Executable()
	if err != nil {
		return name
	}
	return filepath.Join(filepath.Dir(self), name)
}

// readHostConfig reads the settings that every command has.
func readHostConfig(cmd *ucli.Command) (agent.Config, error) {
	cfg := agent.Config{
		InstallDir: filepath.Clean(cmd.String("install-dir")),
		NoLoad:     cmd.Bool("no-load"), NoCUDA: cmd.Bool("no-cuda-check"),
		DryRun: cmd.Bool("dry-run"), Wait: cmd.Duration("wait-build"),
		ReplaceForeign: cmd.String(
			"foreign",
		) == "replace", AllowDowngrade: cmd.Bool("allow-downgrade"), Retry: cmd.Bool("retry"),
		Persistence: cmd.Bool("persistence"), EditBoot: cmd.Bool("edit-boot"),
	}
	var errs []error
	var err error
	if text := cmd.String("maintenance"); text != "" {
		if cfg.Maintenance, err = agent.ParseWindow(text); err != nil {
			errs = append(errs, cli.About(err, "maintenance"))
		}
	}
	cfg.WaitIdle = cmd.Duration("wait-idle")
	if cfg.ModuleParams, err = readParams(cmd.StringSlice("module-param")); err != nil {
		errs = append(errs, cli.About(err, "module-param"))
	}
	if cfg.InstallDir == "/" {
		errs = append(errs, cli.About(errors.New("install-dir /: want a folder below /"), "install-dir"))
	}
	return cfg, usage(cmd, errs)
}

// readConfig reads the settings of [readHostConfig] and the wish for a driver. It reports all mistakes at once.
func readConfig(cmd *ucli.Command) (agent.Config, error) {
	cfg, err := readHostConfig(cmd)
	errs := []error{err}
	if pin := cmd.String("driver"); strings.HasPrefix(pin, digestPrefix) {
		cfg.Wish, cfg.Pin = target.Default, pin
		if _, err := target.ParseFingerprint(pin); err != nil { // a digest has the same format
			errs = append(errs, cli.About(fmt.Errorf("driver %q: want sha256: and 64 lower-case hex digits", pin), "driver"))
		}
	} else if cfg.Wish, err = target.ParseGPUWish(pin); err != nil {
		errs = append(errs, cli.About(err, "driver"))
	}
	cfg.Flavour = cmd.String("flavour")
	if _, err := target.ParseFlavour(cfg.Flavour); err != nil && cfg.Flavour != resolve.Auto {
		errs = append(errs, cli.About(fmt.Errorf("flavour %q: want auto, proprietary or open", cfg.Flavour), "flavour"))
	}
	return cfg, usage(cmd, errs)
}

// usage joins several errors into one of kind Usage.
func usage(cmd *ucli.Command, errs []error) error {
	return fault.Wrap(fault.Usage, errors.Join(errs...), "see "+cmd.FullName()+" --help")
}

// digestPrefix is the prefix of a --driver that is an artifact's digest instead of a wish.
const digestPrefix = "sha256:"

// paramPattern permits no white space, because the kernel splits a parameter string there.
var paramPattern = regexp.MustCompile(`^([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_-]{1,128}=[!-~]*)$`)

func readParams(list []string) (map[string]string, error) {
	params := map[string]string{}
	for _, p := range list {
		m := paramPattern.FindStringSubmatch(p)
		if m == nil {
			return nil, fmt.Errorf("module parameter %q: want MODULE.KEY=VALUE, as in nvidia.NVreg_EnableGpuFirmware=0", p)
		}
		module := strings.ReplaceAll(m[1], "-", "_")
		params[module] = strings.TrimSpace(params[module] + " " + m[2])
	}
	return params, nil
}

// logger returns the logger of the program. If long is false, its log is discarded, because short commands do not log.
func logger(cmd *ucli.Command, long bool) (*slog.Logger, error) {
	if !long {
		return slog.New(slog.NewTextHandler(io.Discard, nil)), nil
	}
	return cli.Logger(cmd)
}
