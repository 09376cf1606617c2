// Package cosinstaller translates the command line of Google's cos-gpu-installer into the fetcher's arguments. It
// refuses flags that ask for something that the fetcher does not do. It ignores some other flags, and returns a note
// about each.
//
// Source of the flags: cos/tools, src/cmd/cos_gpu_installer, v2.1.9. Later flags, up to v2.5.10, are from release notes
// and from the manifests of known callers.
package cosinstaller

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Name is the name of Google's program.
const Name = "cos-gpu-installer"

// ownFlags are flags that only Google's program has.
var ownFlags = []string{"version", "host-dir", "no-verify", "module-arg"}

// Recognise reports whether a command line is for Google's program: by the program's name, or by its flags.
func Recognise(args []string) bool {
	if len(args) == 0 {
		return false
	}
	if path.Base(args[0]) == Name {
		return true
	}
	if len(args) < 2 || args[1] != "install" {
		return false
	}
	for _, arg := range args[2:] {
		if arg == "--" {
			return false
		}
		name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		_, passed := ignoredFlags[name]
		_, no := refusedFlags[name]
		if strings.HasPrefix(arg, "-") && (passed || no || slices.Contains(ownFlags, name)) {
			return true
		}
	}
	return false
}

// many is a flag that may be repeated.
type many []string

func (m *many) String() string { return strings.Join(*m, ",") }
func (m *many) Set(s string) error {
	*m = append(*m, s)
	return nil
}

// ignoredFlags are flags of Google's program that the fetcher ignores, with the reason to print.
var ignoredFlags = map[string]string{
	"allow-unsigned-driver": "fetcher verifies each driver with the keys in its trust flags",
	"test":                  "fetcher verifies each driver with the keys in its trust flags",
	"skip-nvidia-smi":       "NVML is asked instead of nvidia-smi",
	"force-fallback":        "if the newest driver does not work, set --driver to a branch",
	"target-gpu": "the GPUs of this node are read from the PCI bus; for the driver in a GPU type's own list, set " +
		"-version, as in -version=default@NVIDIA_L4",
	"gcs-download-prefix":        "fetcher looks for COS builds below BUILD_ID/BOARD",
	"gcs-download-bucket-nvidia": "set --driver-mirror to the bucket with the runfiles",
	"gcs-download-prefix-nvidia": "set --driver-mirror to the bucket with the runfiles",
}

// ignoredVariables are environment variables of old versions of Google's program that the fetcher ignores, with the
// reason to print. Source: cos-gpu-installer-docker/entrypoint.sh of GoogleCloudPlatform/cos-gpu-installer.
var ignoredVariables = map[string]string{
	"COS_DOWNLOAD_GCS": "set PREBAKE_KERNEL_MIRROR to the bucket that has BUILD_ID/BOARD, such as gs://cos-tools",
	"GPU_INSTALLER_DOWNLOAD_URL": "set NVIDIA_DRIVER_VERSION, and publish that driver once: " +
		"builder build --driver VERSION",
	"NVIDIA_DRIVER_MD5SUM": "fetcher verifies each driver with the keys in its trust flags",
}

// refusedFlags are flags that ask for something that the fetcher does not do, each with a hint.
var refusedFlags = map[string]string{
	"nvidia-installer-url":      "set -version, and publish that driver once: builder build --driver VERSION",
	"nvidia-installer-url-open": "set -version, and publish that driver once: builder build --driver VERSION",
	"signature-url":             "set PREBAKE_PUBLIC_KEY to the file with the publisher's key",
	"local-artifacts-dir":       "set PREBAKE_REGISTRY=oci:FOLDER to a folder with artifacts",
	"prepare-build-tools":       "leave the flag out: fetcher gets compiled drivers and needs no build tools",
}

// Translate returns the fetcher's arguments for those of Google's program, both without a program name. The notes list
// the ignored flags and environment variables.
func Translate(args []string, getenv func(string) string) (ours, notes []string, err error) {
	usage := func(what, hint string) ([]string, []string, error) {
		return nil, nil, fault.New(fault.Usage, "as "+Name+": "+what, hint)
	}
	for len(args) > 0 && strings.HasPrefix(args[0], "-") { // Google's program accepts logging flags before the command
		args = args[1:]
	}
	if len(args) > 0 && args[0] == "list" {
		return usage("the command list is not supported", "to see which driver this node gets: fetcher resolve; to see "+
			"the drivers that the farm knows: server drivers --server URL")
	}
	if len(args) == 0 || args[0] != "install" {
		return usage(fmt.Sprintf("command %q is not supported", strings.Join(args[:min(len(args), 1)], "")),
			"use the command install; fetcher --help lists fetcher's own commands")
	}
	f := flag.NewFlagSet("install", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	version, dir := f.String("version", getenv("NVIDIA_DRIVER_VERSION"), ""), f.String("host-dir",
		getenv("NVIDIA_INSTALL_DIR_HOST"), "")
	bucket := f.String("gcs-download-bucket", "", "")
	noVerify, debug := f.Bool("no-verify", false, ""), f.Bool("debug", false, "")
	var module many
	f.Var(&module, "module-arg", "")
	for _, name := range []string{"allow-unsigned-driver", "test", "skip-nvidia-smi", "force-fallback",
		"prepare-build-tools"} {
		f.Bool(name, false, "")
	}
	for _, name := range []string{
		"target-gpu", "gcs-download-prefix", "gcs-download-bucket-nvidia", "gcs-download-prefix-nvidia",
		"nvidia-installer-url", "nvidia-installer-url-open", "signature-url", "local-artifacts-dir",
	} {
		f.String(name, "", "")
	}
	if err := f.Parse(args[1:]); err != nil {
		return usage(err.Error(), "correct the flag, or use the flags of fetcher itself: fetcher install --help")
	}
	if f.NArg() > 0 {
		return usage(fmt.Sprintf("argument %q: want only flags after the command install", f.Arg(0)),
			"remove the argument, or use the flags of fetcher itself: fetcher install --help")
	}
	ours = []string{"install", "--host-root=" + first(getenv("PREBAKE_HOST_ROOT"), getenv("ROOT_MOUNT_DIR"), "/root")}
	var wrong []error
	f.Visit(func(given *flag.Flag) {
		if given.Value.String() == "false" {
			return
		}
		if hint, ok := refusedFlags[given.Name]; ok {
			wrong = append(wrong, fault.New(fault.Usage,
				fmt.Sprintf("as %s: fetcher does not support the flag -%s", Name, given.Name), hint))
		}
		if why, ok := ignoredFlags[given.Name]; ok {
			notes = append(notes, fmt.Sprintf("the flag -%s is ignored: %s", given.Name, why))
		}
	})
	for _, name := range slices.Sorted(maps.Keys(ignoredVariables)) {
		if getenv(name) != "" {
			notes = append(notes, fmt.Sprintf("the environment variable %s is ignored: %s", name, ignoredVariables[name]))
		}
	}
	if len(wrong) > 0 {
		return nil, nil, errors.Join(wrong...)
	}
	add := func(name, value string) {
		if value != "" {
			ours = append(ours, "--"+name+"="+value)
		}
	}
	add("install-dir", *dir)
	add("driver", *version)
	if *bucket != "" {
		add("kernel-mirror", "gs://"+strings.TrimPrefix(*bucket, "gs://"))
	}
	for _, m := range module {
		add("module-param", m)
	}
	if *noVerify {
		ours = append(ours, "--no-load")
	}
	if *debug {
		add("log-level", "debug")
	}
	return ours, notes, nil
}

func first(all ...string) string {
	for _, s := range all {
		if s != "" {
			return s
		}
	}
	return ""
}
