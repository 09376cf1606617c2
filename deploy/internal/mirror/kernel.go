package mirror

import (
	"cmp"
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
	"github.com/prebake/prebake/pkg/target"
)

// kernel is one Debian kernel. Its packages headers, common and image have the same version. The package kbuild has the
// build tools, and may have another version.
type kernel struct {
	series  string // such as 6.1
	abi     int    // such as 47 for 6.1.0-47, and 117 for 6.12.117+deb12
	release string // such as 6.1.0-47-cloud-amd64
	arch    string // the folder below arch/
	version string // Debian's version, such as 6.1.170-3
	headers pkg
	common  pkg
	kbuild  pkg
	image   pkg
}

// ownSeries is the kernel series of Debian 12 itself.
const ownSeries = "6.1"

// buildMajors maps the kernel series of Debian 12 to the first number of the mirror's BUILD_IDs. COS's milestones 109
// and 125 have kernels of these series and BUILD_IDs with these numbers. A BUILD_ID is <major>.0.<abi>, or
// <major>.1.<abi> for a second COS build with the same kernel.
var buildMajors = map[string]int{ownSeries: 17800, "6.12": 19216}

// buildMajor returns the first number of the kernel's BUILD_IDs.
func (k kernel) buildMajor() int { return buildMajors[k.series] }

// findKernels returns the kernels of the given series whose packages are all in the index. It sorts them by series, and
// within a series from the oldest to the newest.
func findKernels(ctx context.Context, a *apt, p platform, series []string) ([]kernel, error) {
	names, err := a.packageNames(ctx, "linux-headers-")
	if err != nil {
		return nil, err
	}
	var all []kernel
	var ask []string
	for _, name := range names {
		k, ok := p.kernel(name)
		if !ok || !slices.Contains(series, k.series) {
			continue
		}
		all = append(all, k)
		ask = append(ask, k.headers.Name, k.common.Name, k.image.Name, k.kbuild.Name)
	}
	for _, s := range series {
		if !slices.ContainsFunc(all, func(k kernel) bool { return k.series == s }) {
			return nil, fault.New(fault.Unsupported,
				fmt.Sprintf("find kernels: apt knows no package linux-headers-%s.<n>-%s", s, p.flavour),
				"run on Debian 12 for amd64")
		}
	}
	versions, err := a.versions(ctx, ask...)
	if err != nil {
		return nil, err
	}
	whole := all[:0]
	for _, k := range all {
		if k.setVersions(versions) {
			whole = append(whole, k)
		}
	}
	sort.Slice(whole, func(i, j int) bool {
		if a, b := whole[i], whole[j]; a.series != b.series {
			return target.CompareVersions(a.series, b.series) < 0
		}
		return whole[i].abi < whole[j].abi
	})
	return whole, nil
}

// kernel parses the name of a header package, such as linux-headers-6.1.0-47-cloud-amd64. In a series that Debian
// backports from a later release, names look like linux-headers-6.12.117+deb12-cloud-amd64, and each kernel has its own
// package of build tools.
func (p platform) kernel(headers string) (kernel, bool) {
	m := p.headers().FindStringSubmatch(headers)
	if m == nil {
		return kernel{}, false
	}
	k := kernel{series: m[2], release: strings.TrimPrefix(headers, "linux-headers-"), arch: p.kernelArch}
	k.abi, _ = strconv.Atoi(cmp.Or(m[3], m[4])) // the pattern allows at most six digits
	k.headers.Name, k.common.Name, k.image.Name = headers+p.foreign, "linux-headers-"+m[1]+"-common", "linux-image-"+
		k.release+p.foreign
	if k.kbuild.Name = "linux-kbuild-" + k.series; m[4] != "" {
		k.kbuild.Name = "linux-kbuild-" + m[1]
	}
	return k, true
}

// setVersions sets the versions of the kernel's packages, and reports whether the index has all of them. The map has
// the versions in the index by package name, the newest first.
func (k *kernel) setVersions(versions map[string][]string) bool {
	if len(versions[k.headers.Name]) == 0 || len(versions[k.kbuild.Name]) == 0 {
		return false
	}
	k.version = versions[k.headers.Name][0]
	k.headers.Version, k.common.Version, k.image.Version = k.version, k.version, k.version
	k.kbuild.Version = versions[k.kbuild.Name][0]
	return slices.Contains(versions[k.common.Name], k.version) && slices.Contains(versions[k.image.Name], k.version)
}

// defaultKernels is the default number of kernels: the two oldest, and the two newest, which are often siblings.
const defaultKernels = 4

// selectKernels selects kernels by ABI number. Without numbers, it selects the oldest kernel of all if p.oldest is set.
// Otherwise it selects count kernels of Debian 12's own series: half of them the oldest, and half the newest. If count
// is 0, it selects defaultKernels, or all if there are fewer. Of each other series in which no kernel has one of the
// numbers, it selects the newest kernel.
//
// Tests need kernels for which both flavours of the default driver compile: the oldest. Tests also need a kernel for
// which one flavour does not compile: the newest. And they need siblings: the two newest often are.
func (p platform) selectKernels(all []kernel, abis []int, count int) ([]kernel, error) {
	if len(abis) == 0 && p.oldest && len(all) > 0 {
		return all[:1], nil
	}
	for _, abi := range abis {
		if !slices.ContainsFunc(all, func(k kernel) bool { return k.abi == abi }) {
			var have []string
			for _, k := range all {
				have = append(have, strconv.Itoa(k.abi))
			}
			return nil, fault.New(fault.InputMissing,
				fmt.Sprintf("select kernels: Debian's index has no kernel with the ABI number %d", abi),
				"choose --kernel-abi from "+strings.Join(have, ", "))
		}
	}
	var picked []kernel
	for _, same := range bySeries(all) {
		chosen := slices.DeleteFunc(slices.Clone(same), func(k kernel) bool { return !slices.Contains(abis, k.abi) })
		switch {
		case len(chosen) > 0:
			picked = append(picked, chosen...)
		case same[0].series != ownSeries:
			picked = append(picked, same[len(same)-1])
		case len(abis) > 0:
		case len(same) < count:
			return nil, fault.New(fault.InputMissing,
				fmt.Sprintf("select kernels: %d kernels are wanted, but Debian's index has only %d kernels", count, len(same)),
				"pass a lower number with --kernels; for the default number, remove --kernels")
		default:
			n := count
			if n == 0 {
				n = min(defaultKernels, len(same))
			}
			picked = slices.Concat(picked, same[:n-n/2], same[len(same)-n/2:])
		}
	}
	return picked, nil
}

// bySeries splits a sorted list of kernels into one list for each series.
func bySeries(all []kernel) [][]kernel {
	var groups [][]kernel
	for i := range all {
		if i == 0 || all[i].series != all[i-1].series {
			groups = append(groups, nil)
		}
		groups[len(groups)-1] = append(groups[len(groups)-1], all[i])
	}
	return groups
}

// commit returns a hash in place of COS's kernel commit. The hash is made from the version of Debian's source package.
func (k kernel) commit() string {
	sum := sha256.Sum256([]byte("linux " + k.version))
	return hex.EncodeToString(sum[:20])
}

func (k kernel) packages() []pkg { return []pkg{k.headers, k.common, k.kbuild, k.image} }

// headerTree merges a kernel's packages common, headers and kbuild into the layout of COS's kernel-headers.tgz.
func headerTree(ctx context.Context, a *apt, k kernel) (tree, error) {
	root := "usr/src/linux-headers-" + k.release
	t := tree{}
	read := func(p pkg, where pick) error {
		file, err := a.mustFile(p)
		if err != nil {
			return err
		}
		return readDeb(ctx, t, file, where)
	}
	// The headers of other architectures are left out, as in COS's archive.
	common := pickFolder("usr/src/"+k.common.Name, root)
	err := read(k.common, func(name string) string {
		to := common(name)
		if rest, ok := strings.CutPrefix(to, root+"/arch/"); ok && rest != k.arch && !strings.HasPrefix(rest, k.arch+"/") {
			return ""
		}
		// In this package, scripts and tools are links to folders of the package kbuild. These folders are added below.
		if to == root+"/scripts" || to == root+"/tools" {
			return ""
		}
		return to
	})
	if err != nil {
		return nil, err
	}
	own := pickFolder("usr/src/linux-headers-"+k.release, root)
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
		if err := read(k.kbuild, pickFolder(kbuild+"/"+sub, root+"/"+sub)); err != nil {
			return nil, err
		}
	}
	// COS's header tree has the kernel release in the file kernel.release. Debian writes it to .kernelvariables, which is
	// left out above.
	t.addFile(root+"/include/config/kernel.release", k.release+"\n")
	for _, must := range []string{"Makefile", ".config", "Module.symvers", "include/generated/autoconf.h",
		"include/generated/utsrelease.h", "scripts/mod/modpost"} {
		if _, ok := t[root+"/"+must]; !ok {
			return nil, fault.New(fault.InputMissing,
				fmt.Sprintf("merge headers of %s: Debian's packages have no file %s", k.release, must), "")
		}
	}
	return t, nil
}

// changeCompileInfo makes a header tree look like a second compile of the same kernel, with another user, host and
// time.
func changeCompileInfo(t tree, k kernel, when time.Time) {
	generated := "usr/src/linux-headers-" + k.release + "/include/generated/"
	t.addFile(generated+"utsversion.h",
		fmt.Sprintf("#define UTS_VERSION \"#2 SMP PREEMPT_DYNAMIC %s\"\n", when.Format("Mon Jan _2 15:04:05 MST 2006")))
	if n, ok := t[generated+"compile.h"]; ok {
		text := regexp.MustCompile(`(LINUX_COMPILE_(?:BY|HOST)\s+)"[^"]*"`).ReplaceAllString(string(n.data), `${1}"rebuild"`)
		t.addFile(generated+"compile.h", text)
	}
}

// bootModules are the modules that a test machine loads at boot. The last two are for nvidia-modeset and nvidia-drm.
// The others are for the network card, the disk, and ext4 and vfat, which request crc32c_generic and the nls modules by
// name. loadOrder adds the dependencies, and leaves out modules that are built into the kernel.
var bootModules = []string{
	"virtio_pci", "virtio_net", "virtio_blk", "crc32c_generic", "ext4", "nls_cp437", "nls_ascii", "vfat", "drm_kms_helper",
	"video",
}

// kernelImage returns the kernel image, vmlinuz. It also adds files of the image's package to the tree in: those for
// which the callback returns true.
func kernelImage(ctx context.Context, a *apt, k kernel, in tree, more func(name string) bool) ([]byte, error) {
	file, err := a.mustFile(k.image)
	if err != nil {
		return nil, err
	}
	boot := "boot/vmlinuz-" + k.release
	err = readDeb(ctx, in, file, func(name string) string {
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
		return nil, fault.New(fault.InputMissing,
			"find the image of kernel "+k.release+": package "+k.image.Name+" does not have it", "")
	}
	return image.data, nil
}

// bootTree packs the files for starting this kernel in a test machine: image, bootModules in load order, and the
// emulated GPU unless it is nil.
func bootTree(ctx context.Context, a *apt, k kernel, emuGPU []byte) (tree, error) {
	in := tree{}
	modules := "lib/modules/" + k.release
	image, err := kernelImage(ctx, a, k, in,
		func(name string) bool { return strings.HasPrefix(name, modules+"/") && moduleFile(name) })
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
		file := path.Base(strings.TrimSuffix(name, ".xz"))
		t.add("modules/"+file, node{mode: 0o644, data: in[name].data})
		fmt.Fprintln(&list, file)
	}
	t.addFile("modules/order", list.String())
	if emuGPU != nil {
		t.add("emugpu.ko", node{mode: 0o644, data: emuGPU})
	}
	return t, nil
}
