package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// hostFlags say where the node is.
func hostFlags() []ucli.Flag {
	return []ucli.Flag{
		&ucli.StringFlag{Name: "host-root", Value: "/", Usage: "`FOLDER` where the node's root is mounted; /root in a GKE DaemonSet", Sources: cli.Env("host-root"), Validator: absolute},
		&ucli.StringFlag{Name: "install-dir", Value: "/home/kubernetes/bin/nvidia", Usage: "install `FOLDER`, seen from the node's root; /var/lib/nvidia on plain COS", Sources: cli.Env("install-dir"), Validator: absolute},
	}
}

// wishFlags say what the node wants and who is asked for it.
func wishFlags() []ucli.Flag {
	return []ucli.Flag{
		&ucli.StringFlag{Name: "server", Usage: "`URL` of the Prebake server to ask", Sources: cli.Env("server")},
		&ucli.StringFlag{Name: "registry", Usage: "`REF` of a repository to look in when there is no server: host/name or oci:FOLDER", Sources: cli.Env("registry")},
		&ucli.StringFlag{Name: "driver", Value: string(target.Default), Usage: "default, latest, a branch such as R535, or a `VERSION`", Sources: cli.Env("driver")},
		&ucli.StringFlag{Name: "flavour", Value: resolve.Auto, Usage: "auto (open where it drives this node's GPUs, else proprietary), proprietary or open", Sources: cli.Env("flavour")},
		&ucli.DurationFlag{Name: "wait", Usage: "longest `TIME` to wait for a build in progress or a service that fails; 0 asks once", Sources: cli.Env("wait")},
	}
}

// changeFlags are those of commands that change the node.
func changeFlags() []ucli.Flag {
	return []ucli.Flag{
		&ucli.BoolFlag{Name: "dry-run", Usage: "resolve and verify, then print what would be done and change nothing", Sources: cli.Env("dry-run")},
		&ucli.BoolFlag{Name: "no-load", Usage: "install and switch, but load no module", Sources: cli.Env("no-load")},
		&ucli.StringFlag{Name: "probe", Value: sibling("nvmlprobe"), Usage: "`PROGRAM` that asks NVML", Sources: cli.Env("probe")},
		&ucli.StringSliceFlag{Name: "module-param", Usage: "module parameter `MODULE.KEY=VALUE`, as in nvidia.NVreg_EnableGpuFirmware=0; may be repeated", Sources: cli.Env("module-param")},
	}
}

// installFlags are what install and run share.
func installFlags() []ucli.Flag {
	flags := append(hostFlags(), wishFlags()...)
	flags = append(flags, changeFlags()...)
	flags = append(flags, cli.TrustFlags()...)
	flags = append(flags,
		&ucli.StringFlag{Name: "key", Value: defaultKeys, Usage: "`FILE` with the public keys (PEM) whose signatures are trusted; with --trusted-root there need not be one", Sources: cli.Env("key")},
		&ucli.StringFlag{Name: "load-test", Value: "any", Usage: "take artifacts that had static checks only (any), or only those that a kernel has loaded (tested)", Sources: cli.Env("load-test")},
		&ucli.StringFlag{Name: "builder", Usage: "`PROGRAM` that compiles on this node when nothing is published; never turns that off (default: builder beside this program, if it is there)", Sources: cli.Env("builder")},
		&ucli.StringFlag{Name: "kernel-mirror", Usage: "`URL` of the COS release bucket for a compile on this node", Sources: cli.Env("kernel-mirror")},
		&ucli.StringFlag{Name: "driver-mirror", Usage: "`URL` of the driver bucket for a compile on this node", Sources: cli.Env("driver-mirror")},
		&ucli.StringFlag{Name: "state-dir", Value: "/var/lib/prebake", Usage: "`FOLDER`, seen from the node's root, for what is compiled on this node and its key", Sources: cli.Env("state-dir"), Validator: absolute},
		&ucli.StringFlag{Name: "cache", Usage: "`FOLDER` of the cache for a compile on this node (default: cache in the state folder)", Sources: cli.Env("cache")},
		cli.OutputFlag(),
	)
	return append(flags, cli.LogFlags()...)
}

// defaultKeys is where an image or a node keeps the trusted keys.
const defaultKeys = "/etc/prebake/keys.pem"

func absolute(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("folder %q: want an absolute path", path)
	}
	return nil
}

// sibling names a program beside this one.
func sibling(name string) string {
	self, err := os.Executable()
	if err != nil {
		return name
	}
	return filepath.Join(filepath.Dir(self), name)
}

// readHostConfig reads what every command has.
func readHostConfig(cmd *ucli.Command) (agent.Config, error) {
	cfg := agent.Config{
		HostRoot: filepath.Clean(cmd.String("host-root")), InstallDir: filepath.Clean(cmd.String("install-dir")),
		NoLoad: cmd.Bool("no-load"), DryRun: cmd.Bool("dry-run"), Wait: cmd.Duration("wait"),
	}
	var errs []error
	var err error
	if cfg.ModuleParams, err = readParams(cmd.StringSlice("module-param")); err != nil {
		errs = append(errs, err)
	}
	if cfg.InstallDir == "/" {
		errs = append(errs, errors.New("install-dir /: want a folder of its own"))
	}
	return cfg, fault.Wrap(fault.Usage, errors.Join(errs...), "see "+cmd.FullName()+" --help")
}

// readConfig also reads the node's wish; every mistake is told at once.
func readConfig(cmd *ucli.Command) (agent.Config, error) {
	cfg, err := readHostConfig(cmd)
	errs := []error{err}
	if cfg.Wish, err = target.ParseWish(cmd.String("driver")); err != nil {
		errs = append(errs, err)
	}
	cfg.Flavour = cmd.String("flavour")
	if _, err := target.ParseFlavour(cfg.Flavour); err != nil && cfg.Flavour != resolve.Auto {
		errs = append(errs, fmt.Errorf("flavour %q: want auto, proprietary or open", cfg.Flavour))
	}
	return cfg, fault.Wrap(fault.Usage, errors.Join(errs...), "see "+cmd.FullName()+" --help")
}

// paramPattern keeps a parameter one word: the kernel splits at white space.
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

// logger is for programs that run long; short commands say what they have to
// say through progress and errors.
func logger(cmd *ucli.Command, long bool) (*slog.Logger, error) {
	if !long {
		return slog.New(slog.NewTextHandler(io.Discard, nil)), nil
	}
	return cli.Logger(cmd)
}
