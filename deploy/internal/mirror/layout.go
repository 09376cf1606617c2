package mirror

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
	"sync"
	"time"

	"github.com/gofrs/flock"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/target"
)

// toolVersion returns the version of a program that packs objects. The version is part of a recipe, because another
// version may write other bytes.
func toolVersion(ctx context.Context, name string) (string, error) {
	out, err := output(exec.CommandContext(ctx, name, "--version"))
	if err != nil {
		return "", err
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line, nil
}

func toolVersions(ctx context.Context, names ...string) ([]string, error) {
	var all []string
	for _, name := range names {
		v, err := toolVersion(ctx, name)
		if err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, nil
}

// lock keeps other runs from using the cache folder until unlock is called. It removes files that a killed run left
// there.
func lock(ctx context.Context, c Config) (unlock func() error, err error) {
	l := flock.New(filepath.Join(c.Cache, "lock"))
	locked, err := l.TryLock()
	if err == nil && !locked {
		c.Progress("waiting for another run that uses " + c.Cache)
		_, err = l.TryLockContext(ctx, 500*time.Millisecond)
	}
	if err != nil {
		return nil, fmt.Errorf("lock the cache folder %s: %w", c.Cache, err)
	}
	for _, pattern := range []string{"work-*", "debian*/download-*", "objects/.*.tmp-*", "emulators/.new-*"} {
		stale, err := filepath.Glob(filepath.Join(c.Cache, pattern))
		for _, dir := range stale {
			err = errors.Join(err, os.RemoveAll(dir))
		}
		if err != nil {
			return nil, errors.Join(err, l.Unlock())
		}
	}
	return l.Unlock, nil
}

// inWorkDir makes a scratch folder in the cache, passes it to the callback, and removes it afterwards.
func (m *maker) inWorkDir(f func(dir string) error) (err error) {
	dir, err := os.MkdirTemp(m.Cache, "work-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	return f(dir)
}

func (m *maker) makeToolchain(ctx context.Context) (object, error) {
	r, err := m.toolchainRecipe(ctx, "toolchain.tar.xz", m.toolchainPkgs)
	if err != nil {
		return object{}, err
	}
	return m.object(ctx, "toolchain for "+string(m.platform.arch), r, func(ctx context.Context, w io.Writer) error {
		return m.inWorkDir(func(dir string) error {
			t, err := toolchainTree(ctx, m.apt, m.platform, m.toolchainPkgs, dir)
			if err != nil {
				return err
			}
			return t.writeTarXZ(ctx, w, m.xzPreset)
		})
	})
}

func (m *maker) makeDriver(ctx context.Context, r release, releases []release) error {
	dir := filepath.Join(m.Out, "drivers")
	if err := os.MkdirAll(filepath.Join(dir, "sha256"), 0o755); err != nil {
		return err
	}
	versions, err := toolVersions(ctx, "makeself", "zstd", "tar")
	if err != nil {
		return err
	}
	name := cosbucket.RunfileName(r.version, m.platform.arch)
	var t tree
	var edits []string
	lay := func() (err error) {
		if t == nil {
			t, edits, err = m.runfileTree(ctx, r, releases)
		}
		return err
	}
	base, _ := baseOf(r, releases)
	params := []string{undoRecipe, base.sourceVersion()}
	o, err := m.object(ctx, name, recipe{Kind: "driver.run", Packages: r.packages, Tools: versions, Params: params},
		func(ctx context.Context, w io.Writer) error {
			if err := lay(); err != nil {
				return err
			}
			return m.inWorkDir(func(dir string) error { return packRunfile(ctx, t, name, r.version, dir, w) })
		})
	if err != nil {
		return err
	}
	list, err := m.object(ctx, "edits undone in "+name,
		recipe{Kind: "driver.edits", Packages: r.onlySources(), Params: params}, func(_ context.Context, w io.Writer) error {
			if err := lay(); err != nil {
				return err
			}
			_, err := io.WriteString(w, strings.Join(edits, "\n")+"\n")
			return err
		})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(m.Out, "edits"), 0o755); err != nil {
		return err
	}
	if err := list.publish(filepath.Join(m.Out, "edits", r.version+".txt")); err != nil {
		return err
	}
	text, err := os.ReadFile(list.path)
	if err != nil {
		return err
	}
	if strings.HasPrefix(string(text), debianEdition) {
		m.mu.Lock()
		m.notes[r.version] = strings.TrimSpace(string(text))
		m.mu.Unlock()
	}
	if err := o.publish(filepath.Join(dir, name)); err != nil {
		return err
	}
	return putFile(filepath.Join(dir, cosbucket.RunfileSumName(r.version, m.platform.arch)), o.SHA256+"  "+name+"\n")
}

func (m *maker) makeBuild(ctx context.Context, b build, toolchain object, releases []release) error {
	k := target.Kernel{BuildID: b.BuildID, Board: b.Board}
	at := func(name string) string { return filepath.Join(m.Out, "cos", filepath.FromSlash(name)) }
	if err := os.MkdirAll(filepath.Dir(at(cosbucket.HeadersName(k))), 0o755); err != nil {
		return err
	}
	r := recipe{Kind: "kernel-headers.tgz", Packages: []pkg{b.kernel.headers, b.kernel.common, b.kernel.kbuild}}
	if b.second {
		r.Params = []string{"second build"}
	}
	headers, err := m.object(ctx, "headers of "+b.BuildID, r, func(ctx context.Context, w io.Writer) error {
		t, err := headerTree(ctx, m.apt, b.kernel)
		if err != nil {
			return err
		}
		if b.second {
			changeCompileInfo(t, b.kernel, b.mtime)
		}
		return t.writeTgz(w, "./", b.mtime)
	})
	if err != nil {
		return err
	}
	objects := map[string]object{cosbucket.HeadersName(k): headers, cosbucket.ToolchainName(k): toolchain}
	if !m.NoBoot {
		if objects[cosbucket.BootName(k)], err = m.makeBoot(ctx, b.kernel, headers); err != nil {
			return err
		}
	}
	if m.VMLinux {
		if objects[cosbucket.VMLinuxName(k)], err = m.makeVMLinux(ctx, b.kernel); err != nil {
			return err
		}
	}
	for name, o := range objects {
		if err := o.publish(at(name)); err != nil {
			return err
		}
		if err := writeMD5(at(name), o.MD5); err != nil {
			return err
		}
	}
	for name, text := range m.textFiles(k, b, releases) {
		if err := publishText(at(name), text); err != nil {
			return err
		}
	}
	return nil
}

// textFiles returns the small text files of a COS build, by their names in the bucket. The first release is the
// default.
func (m *maker) textFiles(k target.Kernel, b build, releases []release) map[string]string {
	stable, latest := releases[0], latestOf(releases)
	all := map[string]string{
		cosbucket.ToolchainEnvName(k):   m.platform.env(),
		cosbucket.CommitName(k):         b.kernel.commit() + "\n",
		cosbucket.KernelInfoName(k):     "URL=deb:linux@" + b.kernel.version + "\n",
		cosbucket.DefaultVersionName(k): stable.version + "\n",
		cosbucket.LatestVersionName(k):  latest.version + "\n",
		cosbucket.DriverVersionsName(k): driverVersions(releases),
	}
	for branch, version := range newestByBranch(releases) {
		all[cosbucket.BranchVersionName(k, branch)] = version + "\n"
	}
	return all
}

// latestOf returns the newest release. There must be at least one.
func latestOf(releases []release) release {
	return *newestRelease(releases, func(release) bool { return true })
}

// newestByBranch maps each branch to its newest release.
func newestByBranch(releases []release) map[string]string {
	all := map[string]string{}
	for _, r := range releases {
		if b := target.Branch(r.version); target.CompareVersions(r.version, all[b]) > 0 {
			all[b] = r.version
		}
	}
	return all
}

// driverVersions returns the text of gpu_driver_versions.textproto. The default release comes first, as in COS's files.
func driverVersions(releases []release) string {
	var out strings.Builder
	for _, gpu := range []string{"NO_GPU", "OTHERS"} {
		fmt.Fprintf(&out, "gpu_driver_version_info {\n  gpu_device {\n    gpu_type: %q\n  }\n", gpu)
		entry := func(label, version string) {
			fmt.Fprintf(&out, "  supported_driver_versions {\n    label: %q\n    version: %q\n  }\n", label, version)
		}
		entry("DEFAULT", releases[0].version)
		entry("LATEST", latestOf(releases).version)
		newest := newestByBranch(releases)
		for _, branch := range slices.Sorted(maps.Keys(newest)) {
			entry(branch, newest[branch])
		}
		out.WriteString("}\n")
	}
	return out.String()
}

func (m *maker) makeBoot(ctx context.Context, k kernel, headers object) (object, error) {
	r := recipe{Kind: "prebake-boot.tgz", Packages: []pkg{k.image},
		Params: []string{"modules " + strings.Join(bootModules, " ")}}
	if m.EmuGPU != nil {
		r.Packages = append([]pkg{k.image, k.headers, k.common, k.kbuild}, m.toolchainPkgs...)
		r.Params = append(r.Params, "emugpu "+m.EmuGPURevision)
	}
	return m.object(ctx, "boot files of "+k.release, r, func(ctx context.Context, w io.Writer) error {
		var emu []byte
		if m.EmuGPU != nil {
			var err error
			if emu, err = m.compileEmuGPU(ctx, k.release, m.platform.env(), headers, m.toolchain, nil); err != nil {
				return fmt.Errorf("compile the emulated GPU for %s: %w", k.release, err)
			}
		}
		t, err := bootTree(ctx, m.apt, k, emu)
		if err != nil {
			return err
		}
		return t.writeTgz(w, "./", epoch)
	})
}

// compileEmuGPU compiles the emulated GPU for the kernel of a header archive, and returns the module. After the
// compile, it calls finish, which may change the module's file, for example sign it; finish may be nil.
func (m *maker) compileEmuGPU(ctx context.Context, release, toolchainEnv string, headers object,
	toolchain *toolchainFolder, finish func(ctx context.Context, headersDir, ko string) error) (ko []byte, err error) {
	tools, err := toolchain.dir(ctx, m.Cache)
	if err != nil {
		return nil, err
	}
	err = m.inWorkDir(func(dir string) error {
		if _, err := output(exec.CommandContext(ctx, "tar", "-xzf", headers.path, "-C", dir)); err != nil {
			return err
		}
		env := map[string]string{}
		for line := range strings.Lines(toolchainEnv) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			env[name] = value
		}
		headersDir := filepath.Join(dir, "usr/src/linux-headers-"+release)
		path, err := m.EmuGPU(ctx, m.platform.arch, headersDir, tools, env, release)
		if err != nil {
			return err
		}
		if finish != nil {
			if err := finish(ctx, headersDir, path); err != nil {
				return err
			}
		}
		ko, err = os.ReadFile(path)
		return err
	})
	return ko, err
}

// toolchainFolder is a folder with an unpacked toolchain archive. The first call of dir unpacks it.
type toolchainFolder struct {
	object object
	once   sync.Once
	path   string
	err    error
}

func (u *toolchainFolder) dir(ctx context.Context, parent string) (string, error) {
	u.once.Do(func() {
		if u.path, u.err = os.MkdirTemp(parent, "work-toolchain-"); u.err == nil {
			_, u.err = output(exec.CommandContext(ctx, "tar", "-xJf", u.object.path, "-C", u.path))
		}
	})
	return u.path, u.err
}

func (u *toolchainFolder) remove() error {
	if u.path == "" {
		return nil
	}
	return os.RemoveAll(u.path)
}
