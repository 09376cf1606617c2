package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// dkmsSeconds returns how many seconds Debian's dkms takes to compile and strip a cell's modules. dkms runs from its
// unpacked package, in a bubblewrap sandbox that sees the machine read-only. It installs nothing. At the end,
// dkmsSeconds removes the modules.
func (b *bench) dkmsSeconds(ctx context.Context, c cell) (seconds float64, err error) {
	headers, err := b.headerTree(ctx, c.kernel)
	if err != nil {
		return 0, err
	}
	source, err := b.source(ctx, c.driver)
	if err != nil {
		return 0, err
	}
	if b.dkms == "" {
		if b.dkms, err = b.unpackDKMS(ctx); err != nil {
			return 0, err
		}
	}
	dir := filepath.Join(b.Dir, "dkms")
	tree := filepath.Join(dir, "source", "nvidia-"+c.driver)
	if err := os.CopyFS(tree, os.DirFS(source)); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Mkdir(filepath.Join(dir, "tree"), 0o755); err != nil {
		return 0, err
	}
	if err := os.WriteFile(filepath.Join(tree, "dkms.conf"), []byte(dkmsConf(c.driver)), 0o644); err != nil {
		return 0, err
	}
	start := time.Now()
	err = b.command(ctx, "bwrap", "--unshare-all", "--uid", "0", "--gid", "0", "--die-with-parent",
		"--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", "--bind", b.Dir, b.Dir,
		"bash", b.dkms, "build", "-m", "nvidia", "-v", c.driver, "-k", c.kernel.Release, "-a", "x86_64",
		"--kernelsourcedir", headers, "--dkmstree", filepath.Join(dir, "tree"), "--sourcetree", filepath.Join(dir, "source"),
		"-j", fmt.Sprint(runtime.NumCPU()))
	seconds = time.Since(start).Seconds()
	if err != nil {
		return 0, err
	}
	built, err := filepath.Glob(filepath.Join(dir, "tree", "nvidia", c.driver, c.kernel.Release, "x86_64", "module",
		"*.ko*"))
	if err == nil && len(built) != len(dkmsModules()) {
		err = fmt.Errorf("build %s with dkms: dkms made %d modules; want %d modules", c, len(built), len(dkmsModules()))
	}
	return seconds, err
}

func (b *bench) unpackDKMS(ctx context.Context) (string, error) {
	dir := filepath.Join(b.Dir, "dkms-package")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	if err := b.command(ctx, "sh", "-c", `cd "$1" && apt-get download -qq dkms && dpkg -x dkms_*.deb .`, "sh",
		dir); err != nil {
		return "", err
	}
	return filepath.Join(dir, "usr", "sbin", "dkms"), nil
}

func dkmsModules() []string {
	return []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm", "nvidia-peermem"}
}

// dkmsConf returns the text of dkms.conf for a driver: the template in NVIDIA's runfile, filled in as NVIDIA's
// installer does, with the compiler and the header tree.
func dkmsConf(version string) string {
	var conf strings.Builder
	fmt.Fprintf(&conf, "PACKAGE_NAME=nvidia\nPACKAGE_VERSION=%s\nAUTOINSTALL=yes\n", version)
	fmt.Fprintf(&conf, "MAKE[0]=\"'make' -j%d KERNEL_UNAME=${kernelver} %s modules\"\n", runtime.NumCPU(),
		strings.Join(makeFlags("${kernel_source_dir}"), " "))
	conf.WriteString("CLEAN=\"'make' " + strings.Join(makeFlags("${kernel_source_dir}"), " ") + " clean\"\n")
	for i, name := range dkmsModules() {
		fmt.Fprintf(&conf, "BUILT_MODULE_NAME[%d]=%s\nDEST_MODULE_LOCATION[%d]=/kernel/drivers/video\n", i, name, i)
	}
	return conf.String()
}
