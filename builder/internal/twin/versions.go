package twin

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

// maxVersions bounds gpu_driver_versions in both its forms; real ones have a few KiB.
const maxVersions = 1 << 20

// anyGPU are the gpu_type rows that stand for no particular product. COS's
// installer looks a version up in the row of the node's GPU, and lists that
// come from nowhere else start with these.
var anyGPU = []string{"NO_GPU", "OTHERS"}

// withVersion adds a version to the rows of those kinds of GPUs that it
// serves, as one that can be asked for by number only: which version is the
// default is COS's to say, not ours.
func withVersion(list *gpuversions.GPUDriverVersionInfoList, version string, serves func(gpuType string) bool) {
	for _, t := range anyGPU {
		if !slices.ContainsFunc(list.GetGpuDriverVersionInfo(), func(i *gpuversions.GPUDriverVersionInfo) bool { return i.GetGpuDevice().GetGpuType() == t }) {
			list.GpuDriverVersionInfo = append(list.GpuDriverVersionInfo, &gpuversions.GPUDriverVersionInfo{GpuDevice: &gpuversions.GPUDevice{GpuType: t}})
		}
	}
	for _, info := range list.GetGpuDriverVersionInfo() {
		t := info.GetGpuDevice().GetGpuType()
		if !slices.Contains(anyGPU, t) && t != "OTHER" && !serves(t) {
			continue
		}
		if !slices.ContainsFunc(info.GetSupportedDriverVersions(), func(v *gpuversions.DriverVersion) bool { return v.GetVersion() == version }) {
			info.SupportedDriverVersions = append(info.SupportedDriverVersions, &gpuversions.DriverVersion{Version: version})
		}
	}
}

// editText is withVersion for gpu_driver_versions.textproto; nil is no file.
// A file that would not change is returned as it is.
func editText(have []byte, version string, serves func(string) bool) ([]byte, error) {
	var list gpuversions.GPUDriverVersionInfoList
	// A field that is unknown here would be lost, and so is an error.
	if err := prototext.Unmarshal(have, &list); err != nil {
		return nil, newer(err)
	}
	before := proto.Clone(&list)
	withVersion(&list, version, serves)
	if have != nil && proto.Equal(before, &list) {
		return have, nil
	}
	return printText(&list), nil
}

// editBinary is withVersion for gpu_driver_versions.bin. Fields that are
// unknown here stay.
func editBinary(have []byte, version string, serves func(string) bool) ([]byte, error) {
	var list gpuversions.GPUDriverVersionInfoList
	if err := proto.Unmarshal(have, &list); err != nil {
		return nil, newer(err)
	}
	before := proto.Clone(&list)
	withVersion(&list, version, serves)
	if have != nil && proto.Equal(before, &list) {
		return have, nil
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(&list)
}

func newer(err error) error {
	text := strings.ReplaceAll(err.Error(), "\u00a0", " ") // protobuf varies its white space
	return fault.New(fault.PublishRefused, fmt.Sprintf("what is there cannot be extended: %.300s", text),
		"update this program if the file is newer than it, or remove the file by hand if it is damaged")
}

// printText prints the list in protobuf's text format. The library's own
// printer varies its white space on purpose, and equal lists have to be equal
// bytes.
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

// forInstaller reports whether Google's installer could use what is published:
// it takes ready modules of the open flavour only.
func forInstaller(d target.Driver) bool { return d.Flavour == target.Open }
