package mirror

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// kernel is one Debian kernel: its packages are all of one version, save the
// build tools, which Debian keeps in one version for all of them.
type kernel struct {
	series  string // 6.1.0
	abi     int
	release string // 6.1.0-47-cloud-amd64
	arch    string // the folder below arch/
	version string // Debian's, such as 6.1.170-3
	headers pkg
	common  pkg
	kbuild  pkg
	image   pkg
}

// findKernels returns the release's own kernels in the index, oldest first.
// Backported kernels have names of another form and stay out.
func findKernels(ctx context.Context, a *apt, p platform) ([]kernel, error) {
	names, err := a.names(ctx, "linux-headers-")
	if err != nil {
		return nil, err
	}
	var all []kernel
	var ask []string
	pattern := p.headers()
	for _, name := range names {
		m := pattern.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		abi, err := strconv.Atoi(m[2])
		if err != nil {
			return nil, fmt.Errorf("read package name %s: %w", name, err)
		}
		k := kernel{series: m[1], abi: abi, release: strings.TrimPrefix(name, "linux-headers-"), arch: p.kernelArch}
		k.headers.Name, k.common.Name, k.image.Name = name+p.foreign, fmt.Sprintf("linux-headers-%s-%d-common", k.series, abi), "linux-image-"+k.release+p.foreign
		k.kbuild.Name = "linux-kbuild-" + k.series[:strings.LastIndexByte(k.series, '.')]
		all = append(all, k)
		ask = append(ask, k.headers.Name, k.common.Name, k.image.Name, k.kbuild.Name)
	}
	if len(all) == 0 {
		return nil, fault.New(fault.Unsupported, "find kernels: apt knows no linux-headers-<version>-<abi>-"+p.flavour, "run on Debian 12 for amd64")
	}
	versions, err := a.versions(ctx, ask...)
	if err != nil {
		return nil, err
	}
	whole := all[:0]
	for _, k := range all {
		if k.complete(versions) {
			whole = append(whole, k)
		}
	}
	sort.Slice(whole, func(i, j int) bool { return whole[i].abi < whole[j].abi })
	return whole, nil
}

// complete fills in the versions and reports whether all packages exist.
func (k *kernel) complete(versions map[string][]string) bool {
	if len(versions[k.headers.Name]) == 0 || len(versions[k.kbuild.Name]) == 0 {
		return false
	}
	k.version = versions[k.headers.Name][0]
	k.headers.Version, k.common.Version, k.image.Version = k.version, k.version, k.version
	k.kbuild.Version = versions[k.kbuild.Name][0]
	return slices.Contains(versions[k.common.Name], k.version) && slices.Contains(versions[k.image.Name], k.version)
}

// selectKernels picks by ABI number, or the count-1 oldest and the newest: old
// ones compile with the stable driver, the newest shows the API break.
func (p platform) selectKernels(all []kernel, abis []int, count int) ([]kernel, error) {
	if len(abis) == 0 && p.oldest && len(all) > 0 {
		return all[:1], nil
	}
	if len(abis) == 0 {
		if len(all) < count {
			return nil, fault.New(fault.InputMissing, fmt.Sprintf("select kernels: %d wanted, %d in Debian's index", count, len(all)), "ask for fewer with --kernels")
		}
		return append(slices.Clone(all[:count-1]), all[len(all)-1]), nil
	}
	var have []string
	picked := make([]kernel, 0, len(abis))
	for _, k := range all {
		have = append(have, strconv.Itoa(k.abi))
		if slices.Contains(abis, k.abi) {
			picked = append(picked, k)
		}
	}
	if len(picked) != len(abis) {
		return nil, fault.New(fault.InputMissing, fmt.Sprintf("select kernels: not all of %v are in Debian's index", abis), "choose --kernel-abi from "+strings.Join(have, ", "))
	}
	return picked, nil
}

// commit stands in for COS's kernel commit: Debian builds from a source
// package, so its name and version name the source as well.
func (k kernel) commit() string {
	sum := sha256.Sum256([]byte("linux " + k.version))
	return hex.EncodeToString(sum[:20])
}

func (k kernel) packages() []pkg { return []pkg{k.headers, k.common, k.kbuild, k.image} }

// headerTree merges the three packages into one tree in the shape of COS's
// kernel-headers.tgz.
func headerTree(ctx context.Context, a *apt, k kernel) (tree, error) {
	root := "usr/src/linux-headers-" + k.release
	t := tree{}
	read := func(p pkg, where pick) error {
		file, ok := a.file(p)
		if !ok {
			return fault.New(fault.InputMissing, "package "+p.Name+" is not at hand", "")
		}
		return readDeb(ctx, t, file, where)
	}
	// Other architectures' headers are left out, as in COS's archive.
	common := under("usr/src/"+k.common.Name, root)
	err := read(k.common, func(name string) string {
		to := common(name)
		if rest, ok := strings.CutPrefix(to, root+"/arch/"); ok && rest != k.arch && !strings.HasPrefix(rest, k.arch+"/") {
			return ""
		}
		// The package has links to kbuild's folders here.
		if to == root+"/scripts" || to == root+"/tools" {
			return ""
		}
		return to
	})
	if err != nil {
		return nil, err
	}
	own := under("usr/src/linux-headers-"+k.release, root)
	err = read(k.headers, func(name string) string {
		to := own(name)
		switch rel := strings.TrimPrefix(to, root+"/"); {
		case strings.HasPrefix(rel, "include/"), strings.HasPrefix(rel, "arch/"), rel == ".config", rel == "Module.symvers":
			return to
		}
		return ""
	})
	if err != nil {
		return nil, err
	}
	kbuild := "usr/lib/" + k.kbuild.Name
	for _, sub := range []string{"scripts", "tools"} {
		if err := read(k.kbuild, under(kbuild+"/"+sub, root+"/"+sub)); err != nil {
			return nil, err
		}
	}
	// Debian keeps the release in .kernelvariables, which also names its
	// compiler; the build tree of COS has it here.
	t.addFile(root+"/include/config/kernel.release", k.release+"\n")
	for _, must := range []string{"Makefile", ".config", "Module.symvers", "include/generated/autoconf.h", "include/generated/utsrelease.h", "scripts/mod/modpost"} {
		if _, ok := t[root+"/"+must]; !ok {
			return nil, fault.New(fault.InputMissing, fmt.Sprintf("merge headers of %s: no %s in Debian's packages", k.release, must), "")
		}
	}
	return t, nil
}

// rebuilt changes the tree into that of a second build of the same kernel: all
// that differs is who built it and when.
func rebuilt(t tree, k kernel, when time.Time) {
	generated := "usr/src/linux-headers-" + k.release + "/include/generated/"
	t.addFile(generated+"utsversion.h", fmt.Sprintf("#define UTS_VERSION \"#2 SMP PREEMPT_DYNAMIC %s\"\n", when.Format("Mon Jan _2 15:04:05 MST 2006")))
	if n, ok := t[generated+"compile.h"]; ok {
		text := regexp.MustCompile(`(LINUX_COMPILE_(?:BY|HOST)\s+)"[^"]*"`).ReplaceAllString(string(n.data), `${1}"rebuild"`)
		t.addFile(generated+"compile.h", text)
	}
}

// bootModules are what a test machine loads at boot, with all that they depend
// on, where the kernel does not have them built in: its network card, and what
// nvidia-modeset and nvidia-drm need of the kernel.
var bootModules = []string{"virtio_pci", "virtio_net", "drm_kms_helper", "video"}

// kernelImage returns the file that boots, and adds what is wanted beside it
// from the kernel's package to in.
func kernelImage(ctx context.Context, a *apt, k kernel, in tree, more func(name string) bool) ([]byte, error) {
	file, ok := a.file(k.image)
	if !ok {
		return nil, fault.New(fault.InputMissing, "package "+k.image.Name+" is not at hand", "")
	}
	boot := "boot/vmlinuz-" + k.release
	err := readDeb(ctx, in, file, func(name string) string {
		if name == boot || more(name) {
			return name
		}
		return ""
	})
	if err != nil {
		return nil, err
	}
	image, ok := in[boot]
	if !ok {
		return nil, fault.New(fault.InputMissing, "find image of "+k.release+": not in "+k.image.Name, "")
	}
	return image.data, nil
}

// bootTree packs what a test machine needs to start this kernel: its image, the
// bootModules in load order, and the emulated GPU if built.
func bootTree(ctx context.Context, a *apt, k kernel, emuGPU []byte) (tree, error) {
	in := tree{}
	modules := "lib/modules/" + k.release
	image, err := kernelImage(ctx, a, k, in, func(name string) bool { return strings.HasPrefix(name, modules+"/") && path.Ext(name) == ".ko" })
	if err != nil {
		return nil, err
	}
	order, err := loadOrder(in, bootModules...)
	if err != nil {
		return nil, err
	}
	t := tree{"vmlinuz": {mode: 0o644, data: image}}
	var list strings.Builder
	for _, name := range order {
		t.add("modules/"+path.Base(name), node{mode: 0o644, data: in[name].data})
		fmt.Fprintln(&list, path.Base(name))
	}
	t.addFile("modules/order", list.String())
	if emuGPU != nil {
		t.add("emugpu.ko", node{mode: 0o644, data: emuGPU})
	}
	return t, nil
}
