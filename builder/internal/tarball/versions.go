package tarball

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	"github.com/prebake/prebake/pkg/cosbucket/gpuversions"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// maxVersions is the maximum size of each format of gpu_driver_versions, in bytes. Real files have a few KiB.
const maxVersions = 1 << 20

// anyGPU has the gpu_type of the rows for no particular product. A list that this package makes has only these rows.
var anyGPU = []string{"NO_GPU", "OTHERS"}

// isGeneral reports whether the row with this gpu_type is for no particular product. Some lists call it OTHER.
func isGeneral(gpuType string) bool { return slices.Contains(anyGPU, gpuType) || gpuType == "OTHER" }

// withVersion returns an edit that adds a version to the rows for no particular product, and to the rows whose gpu_type
// the driver serves. The version gets no label, because only [SetLabels] sets labels.
func withVersion(version string, serves func(gpuType string) bool) edit {
	return func(list *gpuversions.GPUDriverVersionInfoList) error {
		addVersion(list, version, serves)
		return nil
	}
}

func addVersion(list *gpuversions.GPUDriverVersionInfoList, version string, serves func(gpuType string) bool) {
	for _, t := range anyGPU {
		if !slices.ContainsFunc(list.GetGpuDriverVersionInfo(),
			func(i *gpuversions.GPUDriverVersionInfo) bool { return i.GetGpuDevice().GetGpuType() == t }) {
			list.GpuDriverVersionInfo = append(list.GpuDriverVersionInfo,
				&gpuversions.GPUDriverVersionInfo{GpuDevice: &gpuversions.GPUDevice{GpuType: t}})
		}
	}
	for _, info := range list.GetGpuDriverVersionInfo() {
		t := info.GetGpuDevice().GetGpuType()
		if !isGeneral(t) && !serves(t) {
			continue
		}
		if !slices.ContainsFunc(info.GetSupportedDriverVersions(),
			func(v *gpuversions.DriverVersion) bool { return v.GetVersion() == version }) {
			info.SupportedDriverVersions = append(info.SupportedDriverVersions, &gpuversions.DriverVersion{Version: version})
		}
	}
}

// versionsWith returns the versions that have a label in one row.
func versionsWith(list *gpuversions.GPUDriverVersionInfoList, gpuType, label string) []string {
	var all []string
	for _, info := range list.GetGpuDriverVersionInfo() {
		for _, v := range info.GetSupportedDriverVersions() {
			if info.GetGpuDevice().GetGpuType() == gpuType && v.GetLabel() == label {
				all = append(all, v.GetVersion())
			}
		}
	}
	return all
}

// rows returns the gpu_type rows that list a version.
func rows(list *gpuversions.GPUDriverVersionInfoList, version string) []string {
	var all []string
	for _, info := range list.GetGpuDriverVersionInfo() {
		t := info.GetGpuDevice().GetGpuType()
		if t != "" && slices.ContainsFunc(info.GetSupportedDriverVersions(),
			func(v *gpuversions.DriverVersion) bool { return v.GetVersion() == version }) {
			all = append(all, t)
		}
	}
	return all
}

// withLabels returns an edit that removes and sets labels. As in COS's own lists, a version has one entry for each of
// its labels. An entry without a label exists only if the version has no label.
func withLabels(drop, give []Label) edit {
	return func(list *gpuversions.GPUDriverVersionInfoList) error {
		for _, info := range list.GetGpuDriverVersionInfo() {
			t := info.GetGpuDevice().GetGpuType()
			for _, l := range drop {
				if l.GPUType == t && t != "" {
					unlabel(info, l)
				}
			}
			for _, l := range give {
				if l.GPUType != t || t == "" {
					continue
				}
				if err := label(info, l); err != nil {
					return err
				}
			}
		}
		return nil
	}
}

func unlabel(info *gpuversions.GPUDriverVersionInfo, l Label) {
	all := info.GetSupportedDriverVersions()
	for i := 0; i < len(all); i++ {
		if all[i].GetLabel() != l.Label || all[i].GetVersion() != l.Version {
			continue
		}
		more := func(v *gpuversions.DriverVersion) bool { return v != all[i] && v.GetVersion() == l.Version }
		if !slices.ContainsFunc(all, more) {
			all[i].Label = ""
			continue
		}
		all = slices.Delete(all, i, i+1)
		i--
	}
	info.SupportedDriverVersions = all
}

func label(info *gpuversions.GPUDriverVersionInfo, l Label) error {
	all := info.GetSupportedDriverVersions()
	if i := slices.IndexFunc(all, func(v *gpuversions.DriverVersion) bool { return v.GetLabel() == l.Label }); i >= 0 {
		if all[i].GetVersion() != l.Version {
			return taken(l, all[i].GetVersion(), "somebody else")
		}
		return nil
	}
	of := func(v *gpuversions.DriverVersion) bool { return v.GetVersion() == l.Version }
	plain := func(v *gpuversions.DriverVersion) bool { return of(v) && v.GetLabel() == "" }
	if i := slices.IndexFunc(all, plain); i >= 0 {
		all[i].Label = l.Label
		return nil
	}
	i := slices.IndexFunc(all, of)
	if i < 0 {
		return fault.New(fault.Transient, fmt.Sprintf("driver version %s is no longer in the list for GPU type %s", l.Version,
			l.GPUType),
			"find out who removes versions from gpu_driver_versions, then run the command again")
	}
	// The copy keeps fields of COS that this program does not know.
	more := proto.CloneOf(all[i])
	more.Label = l.Label
	info.SupportedDriverVersions = slices.Insert(all, i+1, more)
	return nil
}

// editText changes gpu_driver_versions.textproto. have is nil if there is no file. If the list stays the same, editText
// returns have.
func editText(have []byte, change edit) ([]byte, error) {
	var list gpuversions.GPUDriverVersionInfoList
	// An unknown field is an error, because printing the list would lose it.
	if err := prototext.Unmarshal(have, &list); err != nil {
		return nil, unreadable(err)
	}
	if same, err := change.apply(have, &list); same || err != nil {
		return have, err
	}
	return printText(&list), nil
}

// editBinary changes gpu_driver_versions.bin, as editText does. It keeps unknown fields.
func editBinary(have []byte, change edit) ([]byte, error) {
	var list gpuversions.GPUDriverVersionInfoList
	if err := proto.Unmarshal(have, &list); err != nil {
		return nil, unreadable(err)
	}
	if same, err := change.apply(have, &list); same || err != nil {
		return have, err
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(&list)
}

// edit is a change of gpu_driver_versions.
type edit func(*gpuversions.GPUDriverVersionInfoList) error

// apply applies the edit to the list, and reports whether the list stayed the same. If have is nil, there was no list,
// and the result is false.
func (change edit) apply(have []byte, list *gpuversions.GPUDriverVersionInfoList) (bool, error) {
	before := proto.Clone(list)
	if err := change(list); err != nil {
		return false, err
	}
	return have != nil && proto.Equal(before, list), nil
}

func unreadable(err error) error {
	text := strings.ReplaceAll(err.Error(), "\u00a0", " ") // protobuf varies white space in its messages
	return fault.New(fault.PublishRefused, fmt.Sprintf("the published gpu_driver_versions cannot be read: %.300s", text),
		"if a newer builder wrote the file, install that version of the builder; if the file is damaged, remove it from the "+
			"bucket by hand")
}

// printText prints the list in protobuf's text format. Equal lists need equal bytes, but the library's own printer
// varies its white space.
func printText(list *gpuversions.GPUDriverVersionInfoList) []byte {
	var b strings.Builder
	for _, info := range list.GetGpuDriverVersionInfo() {
		b.WriteString("gpu_driver_version_info {\n")
		if d := info.GetGpuDevice(); d != nil {
			fmt.Fprintf(&b, "  gpu_device {\n    gpu_type: %s\n  }\n", strconv.QuoteToASCII(d.GetGpuType()))
		}
		for _, v := range info.GetSupportedDriverVersions() {
			b.WriteString("  supported_driver_versions {\n")
			if v.GetLabel() != "" {
				fmt.Fprintf(&b, "    label: %s\n", strconv.QuoteToASCII(v.GetLabel()))
			}
			fmt.Fprintf(&b, "    version: %s\n  }\n", strconv.QuoteToASCII(v.GetVersion()))
		}
		b.WriteString("}\n")
	}
	return []byte(b.String())
}

// forInstaller reports whether Google's installer can use the driver's tarball. From a tarball, the installer takes
// only open modules.
func forInstaller(d target.Driver) bool { return d.Flavour == target.Open }
