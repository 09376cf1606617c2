package cosbucket

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	"github.com/prebake/prebake/pkg/cosbucket/gpuversions"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Bounds on the data about drivers in a bucket. Real files have a few KiB.
const (
	maxVersionFile = 1 << 10
	maxVersionList = 1 << 20
	maxVersions    = 4096
	maxGPUs        = 64
)

// DriverList has the driver versions that COS lists for one COS build.
type DriverList struct {
	// Default and Latest are "" if COS lists no such version.
	Default, Latest string
	// Branches maps a branch, such as R535, to its version.
	Branches map[string]string
	// Versions has all versions in any of the files, lowest first.
	Versions []string
	// GPUs has a list for each GPU type with versions of its own. The keys are COS's names of the types, such as
	// NVIDIA_L4.
	GPUs map[string]DriverList
}

// Drivers reads these objects of a COS build: gpu_default_version, gpu_latest_version, the gpu_R*_version files, and
// gpu_driver_versions in its text or binary form. If none of them lists a version, the error is of kind InputMissing. A
// file with a single version wins over gpu_driver_versions, because COS's own installer reads the file with the single
// version.
func (b *Bucket) Drivers(ctx context.Context, k target.Kernel) (DriverList, error) {
	l, err := b.versionList(ctx, k)
	if err != nil {
		return DriverList{}, err
	}
	one := func(name string) (string, error) {
		text, url, err := b.readOfBuild(ctx, k, name, maxVersionFile)
		if err != nil {
			if fault.Is(err, fault.InputMissing) {
				return "", nil
			}
			return "", err
		}
		version, err := ParseVersionFile(text)
		if err != nil {
			return "", fmt.Errorf("read %s: %w", url, err)
		}
		l.Versions = append(l.Versions, version)
		return version, nil
	}
	for name, to := range map[string]*string{DefaultVersionName(k): &l.Default, LatestVersionName(k): &l.Latest} {
		version, err := one(name)
		if err != nil {
			return DriverList{}, err
		}
		if version != "" {
			*to = version
		}
	}
	names, err := b.branchFiles(ctx, k, l)
	if err != nil {
		return DriverList{}, err
	}
	for _, branch := range names {
		version, err := one(BranchVersionName(k, branch))
		if err != nil {
			return DriverList{}, err
		}
		if version != "" {
			l.Branches[branch] = version
		}
	}
	if len(l.Versions) == 0 {
		return DriverList{}, fault.New(fault.InputMissing,
			"list drivers of "+k.String()+": the bucket lists no driver for this COS build",
			"check BUILD_ID and board, or ask for an exact version")
	}
	l.Versions = sortVersions(l.Versions)
	return l, nil
}

// versionList reads the file gpu_driver_versions of a COS build: the text form, or without it the binary form. If the
// build has neither file, the result is empty.
func (b *Bucket) versionList(ctx context.Context, k target.Kernel) (DriverList, error) {
	for _, form := range []struct {
		name  string
		parse func([]byte) (DriverList, error)
	}{{DriverVersionsName(k), ParseDriverVersions}, {DriverVersionsBinName(k), ParseDriverVersionsBin}} {
		text, url, err := b.readOfBuild(ctx, k, form.name, maxVersionList)
		if fault.Is(err, fault.InputMissing) {
			continue
		}
		if err != nil {
			return DriverList{}, err
		}
		l, err := form.parse(text)
		if err != nil {
			return DriverList{}, fmt.Errorf("read %s: %w", url, err)
		}
		return l, nil
	}
	return DriverList{Branches: map[string]string{}}, nil
}

var branchFile = regexp.MustCompile(`/gpu_(R[0-9]{3,4})_version$`)

// branchFiles returns the branches that may have a file gpu_R*_version. If the bucket cannot list, these are the
// branches of the versions in l.
func (b *Bucket) branchFiles(ctx context.Context, k target.Kernel, l DriverList) ([]string, error) {
	var branches []string
	cannot := false
	for _, prefix := range Layouts(k, under(k, "gpu_R")) {
		names, err := b.List(ctx, prefix)
		if cannot = fault.Is(err, fault.Unsupported); cannot {
			break
		}
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if m := branchFile.FindStringSubmatch(name); m != nil {
				branches = append(branches, m[1])
			}
		}
	}
	if cannot {
		for _, v := range l.Versions {
			branches = append(branches, target.Branch(v))
		}
	}
	slices.Sort(branches)
	return slices.Compact(branches), nil
}

// ParseVersionFile parses a file with one driver version and a newline. If the text is not a version, the error is of
// kind Unsupported.
func ParseVersionFile(text []byte) (string, error) {
	version := strings.TrimSpace(string(text))
	if len(text) > maxVersionFile || !target.ValidVersion(version) {
		return "", fault.New(fault.Unsupported, fmt.Sprintf("%.60q is not a driver version", version), "")
	}
	return version, nil
}

// ParseDriverVersions parses gpu_driver_versions.textproto. It ignores unknown fields, and malformed versions and GPU
// types. If several entries give one label to different versions, the entry OTHERS wins: it is for all GPUs without an
// entry of their own. A text that cannot be parsed is an error of kind Unsupported.
func ParseDriverVersions(text []byte) (DriverList, error) {
	return parseVersions(text, prototext.UnmarshalOptions{DiscardUnknown: true}.Unmarshal)
}

// ParseDriverVersionsBin parses gpu_driver_versions.bin, which has the message of gpu_driver_versions.textproto in
// serialized form.
func ParseDriverVersionsBin(data []byte) (DriverList, error) {
	return parseVersions(data, proto.UnmarshalOptions{DiscardUnknown: true, RecursionLimit: 16}.Unmarshal)
}

func parseVersions(data []byte, unmarshal func([]byte, proto.Message) error) (DriverList, error) {
	if len(data) > maxVersionList {
		return DriverList{}, fault.New(fault.Unsupported,
			fmt.Sprintf("the list of driver versions has more than %d bytes", maxVersionList),
			"check that the bucket holds COS builds")
	}
	var list gpuversions.GPUDriverVersionInfoList
	if err := unmarshal(data, &list); err != nil {
		return DriverList{}, fault.Wrap(fault.Unsupported, fmt.Errorf("parse the list of driver versions: %w", err),
			"check that the bucket holds COS builds")
	}
	infos := list.GetGpuDriverVersionInfo()
	slices.SortStableFunc(infos, func(a, b *gpuversions.GPUDriverVersionInfo) int { return rank(a) - rank(b) })
	l := DriverList{Branches: map[string]string{}}
	for _, info := range infos {
		l.add(info)
		if gpu := info.GetGpuDevice().GetGpuType(); rank(info) == 1 && target.ValidGPU(gpu) {
			own := l.GPUs[gpu]
			if own.Branches == nil {
				own.Branches = map[string]string{}
			}
			own.add(info)
			own.Versions = sortVersions(own.Versions)
			if l.GPUs == nil {
				l.GPUs = map[string]DriverList{}
			}
			l.GPUs[gpu] = own
		}
	}
	if len(l.GPUs) > maxGPUs {
		return DriverList{}, fault.New(fault.Unsupported,
			fmt.Sprintf("the list of driver versions has %d types of GPU; want at most %d types", len(l.GPUs), maxGPUs),
			"check that the bucket holds COS builds")
	}
	if l.Versions = sortVersions(l.Versions); len(l.Versions) > maxVersions {
		return DriverList{}, fault.New(fault.Unsupported,
			fmt.Sprintf("the list of driver versions has %d versions; want at most %d versions", len(l.Versions), maxVersions),
			"check that the bucket holds COS builds")
	}
	return l, nil
}

// add adds the versions and labels of one entry. It never replaces a label.
func (l *DriverList) add(info *gpuversions.GPUDriverVersionInfo) {
	for _, v := range info.GetSupportedDriverVersions() {
		if !target.ValidVersion(v.GetVersion()) {
			continue
		}
		l.Versions = append(l.Versions, v.GetVersion())
		wish, err := target.ParseWish(v.GetLabel())
		_, isBranch := wish.BranchName()
		switch {
		case v.GetLabel() == "DEFAULT" && l.Default == "":
			l.Default = v.GetVersion()
		case v.GetLabel() == "LATEST" && l.Latest == "":
			l.Latest = v.GetVersion()
		case err == nil && isBranch && l.Branches[v.GetLabel()] == "":
			l.Branches[v.GetLabel()] = v.GetVersion()
		}
	}
}

// rank is the order in which entries are added. If a label has several versions, the first wins.
func rank(info *gpuversions.GPUDriverVersionInfo) int {
	switch info.GetGpuDevice().GetGpuType() {
	case "OTHERS", "OTHER":
		return 0
	case "NO_GPU":
		return 2
	}
	return 1
}

func sortVersions(versions []string) []string {
	slices.SortFunc(versions, func(a, b string) int {
		if c := target.CompareVersions(a, b); c != 0 {
			return c
		}
		return strings.Compare(a, b)
	})
	return slices.Compact(versions)
}

// Choose returns the version for a wish. An exact version need not be in COS's list. If COS lists no version for the
// wish, the error is of kind Unsupported.
func (l DriverList) Choose(w target.Wish) (string, error) {
	if version, ok := w.Exact(); ok {
		return version, nil
	}
	if wish, gpu := w.GPU(); gpu != "" {
		own, ok := l.GPUs[gpu]
		if !ok {
			return "", fault.New(fault.Unsupported,
				fmt.Sprintf("choose driver %s: COS lists no GPU type %s for this COS build", w, gpu), l.offerGPUs())
		}
		return own.Choose(wish)
	}
	var version string
	branch, isBranch := w.BranchName()
	switch {
	case w == target.Default:
		version = l.Default
	case w == target.Latest:
		version = l.Latest
	case isBranch:
		version = l.Newest()[branch]
	default:
		_, err := target.ParseWish(string(w))
		return "", fault.Wrap(fault.Usage, err, "")
	}
	if version == "" {
		return "", fault.New(fault.Unsupported,
			fmt.Sprintf("choose driver %s: COS lists no such driver for this COS build", w), l.offer())
	}
	return version, nil
}

// offerGPUs returns a hint with the GPU types that have their own lists.
func (l DriverList) offerGPUs() string {
	if len(l.GPUs) == 0 {
		return "leave the GPU type out: this COS build has one list for all GPUs"
	}
	return "ask for one of the GPU types " + strings.Join(slices.Sorted(maps.Keys(l.GPUs)), ", ") +
		"; or leave the GPU type out"
}

// Newest returns one version for each branch: the version that COS lists for the branch, or else the branch's highest
// version without a suffix.
func (l DriverList) Newest() map[string]string {
	newest := map[string]string{}
	for _, v := range l.Versions {
		b := target.Branch(v)
		if target.ModuleVersion(v) == v && (newest[b] == "" || target.CompareVersions(v, newest[b]) > 0) {
			newest[b] = v
		}
	}
	maps.Copy(newest, l.Branches)
	return newest
}

// offer returns a hint with the wishes for which this list has a version.
func (l DriverList) offer() string {
	newest := l.Newest()
	var words []string
	for _, row := range []struct{ name, version string }{{string(target.Default), l.Default},
		{string(target.Latest), l.Latest}} {
		if row.version != "" {
			words = append(words, row.name+" ("+row.version+")")
		}
	}
	for _, b := range slices.Sorted(maps.Keys(newest)) {
		words = append(words, b+" ("+newest[b]+")")
	}
	if len(words) == 0 {
		return "ask for an exact version"
	}
	return "ask for one of the drivers that COS lists for this COS build: " + strings.Join(words, ", ") +
		"; or ask for an exact version"
}
