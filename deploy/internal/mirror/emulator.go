package mirror

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// emulatorProgram is the name of the program in Debian's package qemu-system-x86.
const emulatorProgram = "qemu-system-x86_64"

// emulatorPackages are qemu and the boot ROM of its network card, which qemu needs to start.
var emulatorPackages = []string{"qemu-system-x86", "ipxe-qemu"}

// Emulator unpacks the qemu of the next Debian release below cache, once for each version. It returns the folder with
// the program qemu-system-x86_64. If Debian's archive cannot be reached, the error is Transient.
//
// Unlike qemu 7.2 of Debian 12, this qemu emulates the processor's instructions for SHA-256. So a virtual node takes
// half the time (three installs on 2026-11-29: 47 s in place of 100 s). Debian 12's libraries are too old for this
// qemu, so its own libraries are unpacked too.
func Emulator(ctx context.Context, cache string, progress func(string)) (bin string, err error) {
	c := Config{Cache: cache, Progress: progress}
	unlock, err := lock(ctx, c)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	p := platforms[target.AMD64]
	a, err := openApt(ctx, filepath.Join(cache, p.aptDir()+"-"+nextCodename), p, true, false, progress)
	if err != nil {
		return "", err
	}
	pkgs, err := a.closure(ctx, emulatorPackages...)
	if err != nil {
		return "", err
	}
	name := sha256.New()
	for _, p := range pkgs {
		fmt.Fprintf(name, "%s=%s\n", p.Name, p.Version)
	}
	parent := filepath.Join(cache, "emulators")
	dir := filepath.Join(parent, hex.EncodeToString(name.Sum(nil))[:16])
	bin = filepath.Join(dir, "bin")
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	if err := errors.Join(a.download(ctx, pkgs), os.MkdirAll(parent, 0o755)); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(parent, ".new-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	if err := a.unpackEmulator(ctx, pkgs, tmp); err != nil {
		return "", err
	}
	old, err := filepath.Glob(filepath.Join(parent, "*"))
	if err = errors.Join(err, os.Rename(tmp, dir)); err != nil {
		return "", err
	}
	for _, dir := range old { // older versions take 200 MB each
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return bin, err
}

// unpackEmulator unpacks the packages below dir, and checks that the program starts.
func (a *apt) unpackEmulator(ctx context.Context, pkgs []pkg, dir string) error {
	all := tree{}
	for _, p := range pkgs {
		file, err := a.mustFile(p)
		if err != nil {
			return err
		}
		if err := readDeb(ctx, all, file, pickEmulator); err != nil {
			return err
		}
	}
	// The script starts qemu with the dynamic loader and the libraries of the unpacked packages, in place of this
	// machine's.
	all.add("bin/"+emulatorProgram, node{mode: 0o755, data: []byte(`#!/bin/sh
root=${0%/*}/../usr
lib=$root/lib/x86_64-linux-gnu
exec "$lib/ld-linux-x86-64.so.2" --library-path "$lib" "$root/bin/` + emulatorProgram + `" \
  -L "$root/share/qemu" -L "$root/share/seabios" -L "$root/lib/ipxe/qemu" "$@"
`)})
	if err := all.writeDir(dir); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "bin", emulatorProgram), "-accel", "tcg", "-machine", "q35", "-cpu",
		"max", "-display", "none", "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n", "-S", "-monitor", "stdio")
	cmd.Stdin = strings.NewReader("quit\n")
	_, err := output(cmd)
	return err
}

// pickEmulator selects the program, its libraries and its firmware, without documents and configuration files.
func pickEmulator(name string) string {
	for _, folder := range []string{"usr/bin/" + emulatorProgram, "usr/lib/", "usr/share/qemu/", "usr/share/seabios/"} {
		if strings.HasPrefix(name, folder) {
			return name
		}
	}
	return ""
}

// closure returns the named packages and their dependencies, in the versions that apt would install on an empty
// machine.
func (a *apt) closure(ctx context.Context, names ...string) ([]pkg, error) {
	out, err := a.ask(ctx, "apt-get", append([]string{"install", "-qq", "--print-uris", "--no-install-recommends",
		"-o", "Dir::State::status=/dev/null"}, names...)...)
	if err != nil {
		return nil, fault.Wrap(fault.InputMissing,
			fmt.Errorf("ask apt for the dependencies of %s: %w", strings.Join(names, " and "), err),
			"wait until Debian's archive has the missing package, then run again")
	}
	return parseURIs(out)
}

// parseURIs reads the lines of apt-get --print-uris: 'URL' NAME_VERSION_ARCH.deb SIZE DIGEST (apt-get(8)). In the file
// name, apt writes the colon of an epoch as %3a.
func parseURIs(out []byte) ([]pkg, error) {
	var pkgs []pkg
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		var parts []string
		if len(fields) >= 2 {
			parts = strings.Split(strings.TrimSuffix(fields[1], ".deb"), "_")
		}
		if len(parts) != 3 {
			return nil, fault.New(fault.Unsupported, fmt.Sprintf("read apt's list of packages: the line %q has no file name",
				line), "")
		}
		pkgs = append(pkgs, pkg{parts[0], strings.ReplaceAll(parts[1], "%3a", ":")})
	}
	slices.SortFunc(pkgs, func(x, y pkg) int { return strings.Compare(x.Name, y.Name) })
	return pkgs, nil
}
