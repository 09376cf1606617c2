package mirror

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/prebake/prebake/pkg/bzimage"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm"
)

// clangMajorBuild is the first number of the BUILD_ID of the clang-built kernel. BUILD_IDs of COS's milestone 113,
// which has a kernel of clangSeries, begin with this number.
const clangMajorBuild = 18244

// clangSeries is the series of the kernel that the mirror compiles. Debian's own kernels are of this series, so the
// NVIDIA driver in Debian's packages compiles for it.
const clangSeries = "6.1"

// Files of the key that signs modules, and of its certificate. Both files are in the mirror's folder of the COS build
// whose kernel trusts the certificate.
const (
	signingKeyName  = "test-module-signing.key"
	signingCertName = "test-module-signing.crt"
)

// clangBuild is the COS build for which the mirror compiles the kernel itself.
type clangBuild struct {
	source    pkg
	toolchain []pkg
	release   string
	patch     int // the last number of the release
	pair      signingPair
}

func (b clangBuild) packages() []pkg { return append([]pkg{b.source}, b.toolchain...) }

var upstreamPattern = regexp.MustCompile(`^[0-9]+\.[0-9]+\.([0-9]{1,6})$`)

// planClang asks apt for the newest versions of the kernel's source package and of clang's packages.
func (m *maker) planClang(ctx context.Context) (clangBuild, error) {
	var b clangBuild
	name := "linux-source-" + clangSeries
	versions, err := m.apt.versions(ctx, append([]string{name}, clangPackages...)...)
	if err != nil {
		return b, err
	}
	for _, want := range append([]string{name}, clangPackages...) {
		if len(versions[want]) == 0 {
			return b, fault.New(fault.Unsupported, "plan the clang-built kernel: apt knows no "+want,
				"run on Debian 12 for amd64")
		}
		p := pkg{want, versions[want][0]}
		if want == name {
			b.source = p
		} else {
			b.toolchain = append(b.toolchain, p)
		}
	}
	upstream := b.source.upstream()
	number := upstreamPattern.FindStringSubmatch(upstream)
	if number == nil {
		return b, fault.New(fault.Unsupported,
			fmt.Sprintf("plan the clang-built kernel: version %q of package %s: want 6.1.N", b.source.Version, name), "")
	}
	if b.patch, err = strconv.Atoi(number[1]); err != nil {
		return b, err
	}
	b.release = upstream + "+"
	m.Progress("kernel " + b.release + ", compiled with clang (Debian " + b.source.Version + ")")
	b.pair, err = m.signingKey()
	return b, err
}

// checkClangTools returns an error if this machine lacks tools for compiling a kernel. The error names the Debian
// packages with these tools.
func checkClangTools() error {
	var missing []string
	for _, t := range []struct{ name, pkg string }{
		{"bwrap", "bubblewrap"}, {"make", "make"}, {"bc", "bc"}, {"flex", "flex"}, {"bison", "bison"},
	} {
		if _, err := exec.LookPath(t.name); err != nil {
			missing = append(missing, t.pkg)
		}
	}
	for _, t := range []struct{ header, pkg string }{{"/usr/include/libelf.h", "libelf-dev"},
		{"/usr/include/openssl/evp.h", "libssl-dev"}} {
		if _, err := os.Stat(t.header); err != nil {
			missing = append(missing, t.pkg)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fault.New(fault.Usage, "compile a kernel: these Debian packages are missing: "+strings.Join(missing, ", "),
		"install them: apt-get install "+strings.Join(missing, " "))
}

// makeClang makes the COS build whose kernel clang compiles, and publishes it in the mirror.
func (m *maker) makeClang(ctx context.Context, b clangBuild, releases []release) (_ Build, err error) {
	archive, err := m.makeClangToolchain(ctx, b.toolchain)
	if err != nil {
		return Build{}, err
	}
	toolchain := &toolchainFolder{object: archive}
	defer func() { err = errors.Join(err, toolchain.remove()) }()
	kernel, err := m.makeClangKernel(ctx, b, toolchain)
	if err != nil {
		return Build{}, err
	}
	made := recipe{Params: []string{"kernel " + kernel.SHA256}}
	made.Kind = "clang-kernel-headers.tgz"
	headers, err := m.object(ctx, "headers of "+b.release, made, func(_ context.Context, w io.Writer) error {
		t, err := readTgz(kernel.path, pickFolder(clangHeaders, "usr/src/linux-headers-"+b.release))
		if err != nil {
			return err
		}
		return t.writeTgz(w, "./", epoch)
	})
	if err != nil {
		return Build{}, err
	}
	objects := map[string]object{"headers": headers, "toolchain": archive}
	if !m.NoBoot {
		if objects["boot"], err = m.makeClangBoot(ctx, b, kernel, headers, toolchain); err != nil {
			return Build{}, err
		}
	}
	if m.VMLinux {
		made.Kind = "clang-vmlinux"
		objects["vmlinux"], err = m.object(ctx, "vmlinux of "+b.release, made, func(_ context.Context, w io.Writer) error {
			t, err := readTgz(kernel.path, pickFolder("boot", "boot"))
			if err != nil {
				return err
			}
			linked, err := bzimage.Linked(t[clangImage].data)
			if err != nil {
				return err
			}
			_, err = w.Write(linked)
			return err
		})
		if err != nil {
			return Build{}, err
		}
	}
	done := Build{
		BuildID: fmt.Sprintf("%d.0.%d", clangMajorBuild, b.patch), Board: m.Board, Release: b.release,
		DebianPackageVersion: b.source.Version,
		Note: "compiled here with clang " + clangMajor + " in COS's manner: no MODVERSIONS, LoadPin, module signatures by " +
			signingCertName,
	}
	return done, m.publishClang(b, done, objects, releases)
}

func (m *maker) publishClang(b clangBuild, done Build, objects map[string]object, releases []release) error {
	k := target.Kernel{BuildID: done.BuildID, Board: done.Board}
	at := func(name string) string { return filepath.Join(m.Out, "cos", filepath.FromSlash(name)) }
	dir := filepath.Dir(at(cosbucket.HeadersName(k)))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	names := map[string]string{"headers": cosbucket.HeadersName(k), "toolchain": cosbucket.ToolchainName(k),
		"boot": cosbucket.BootName(k), "vmlinux": cosbucket.VMLinuxName(k)}
	for what, o := range objects {
		name := names[what]
		if err := o.publish(at(name)); err != nil {
			return err
		}
		if err := writeMD5(at(name), o.MD5); err != nil {
			return err
		}
	}
	source := build{Build: done, kernel: kernel{version: b.source.Version}}
	texts := m.textFiles(k, source, m.clangReleases(releases))
	texts[cosbucket.ToolchainEnvName(k)] = clangEnv
	for name, text := range texts {
		if err := publishText(at(name), text); err != nil {
			return err
		}
	}
	for name, text := range map[string][]byte{signingKeyName: b.pair.key, signingCertName: b.pair.cert} {
		if err := putFile(filepath.Join(dir, name), string(text)); err != nil {
			return err
		}
	}
	return os.Chmod(filepath.Join(dir, signingKeyName), 0o600)
}

// clangReleases returns the driver releases for the kernel that the mirror compiles, the default first. The default is
// the newest driver of the machine's own Debian release, because Debian patches that driver for the source of this
// kernel. Older drivers of this Debian release are left out.
func (m *maker) clangReleases(releases []release) []release {
	var own, others []release
	for _, r := range releases {
		if r.apt == m.apt {
			own = append(own, r)
		} else {
			others = append(others, r)
		}
	}
	if len(own) == 0 {
		return others
	}
	return append([]release{latestOf(own)}, others...)
}

// clangBootArgs is the part of COS's command line that excludes modules and firmware from LoadPin.
const clangBootArgs = "loadpin.exclude=kernel-module,firmware\n"

// makeClangBoot packs the boot archive: the kernel image and the module of the emulated GPU. The module is signed, so
// that it also loads if the kernel enforces signatures.
func (m *maker) makeClangBoot(ctx context.Context, b clangBuild, kernel, headers object,
	toolchain *toolchainFolder) (object, error) {
	r := recipe{Kind: "clang-prebake-boot.tgz", Params: []string{"kernel " + kernel.SHA256, "arguments " + clangBootArgs}}
	if m.EmuGPU != nil {
		r.Packages = b.toolchain
		r.Params = append(r.Params, "emugpu "+m.EmuGPURevision)
	}
	return m.object(ctx, "boot files of "+b.release, r, func(ctx context.Context, w io.Writer) error {
		t, err := readTgz(kernel.path, pickFolder("boot", ""))
		if err != nil {
			return err
		}
		t.addFile(vm.BootOrder, "") // the kernel needs no modules to boot
		t.addFile(vm.BootArgs, clangBootArgs)
		if m.EmuGPU != nil {
			emu, err := m.compileEmuGPU(ctx, b.release, clangEnv, headers, toolchain,
				func(ctx context.Context, tree, ko string) error {
					return signModule(ctx, tree, ko, b.pair)
				})
			if err != nil {
				return fmt.Errorf("compile the emulated GPU for %s: %w", b.release, err)
			}
			t.add(vm.BootGPU, node{mode: 0o644, data: emu})
		}
		return t.writeTgz(w, "./", epoch)
	})
}

// signModule signs a module in place with the kernel's own sign-file program.
func signModule(ctx context.Context, headers, ko string, pair signingPair) (err error) {
	dir, err := os.MkdirTemp(filepath.Dir(ko), "sign-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	key, cert := filepath.Join(dir, "key.pem"), filepath.Join(dir, "cert.pem")
	if err := errors.Join(os.WriteFile(key, pair.key, 0o600), os.WriteFile(cert, pair.cert, 0o600)); err != nil {
		return err
	}
	_, err = output(exec.CommandContext(ctx, filepath.Join(headers, "scripts/sign-file"), "sha256", key, cert, ko))
	return err
}

// readTgz reads the selected files from one of the mirror's own objects.
func readTgz(file string, where pick) (_ tree, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	zr, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	t := tree{}
	return t, readTar(t, zr, where)
}
