package cosbucket_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// openQuick opens a bucket that waits only a millisecond before it tries again.
func openQuick(t *testing.T, rawURL string) *cosbucket.Bucket {
	t.Helper()
	b, err := cosbucket.OpenWithWait(t.Context(), rawURL, time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return b
}

func TestChoose(t *testing.T) {
	t.Parallel()
	list := cosbucket.DriverList{
		Default: "535.261.03", Branches: map[string]string{"R535": "535.261.03"},
		Versions: []string{"470.82.1", "470.256.2", "470.256.2-grid", "535.261.03", "535.309.01"},
	}
	tests := []struct {
		wish target.Wish
		want string
		kind fault.Kind // of the error, if want is ""
	}{
		{"default", "535.261.03", 0},
		{"latest", "", fault.Unsupported},
		{"R535", "535.261.03", 0},
		{"R470", "470.256.2", 0},
		{"R580", "", fault.Unsupported},
		{"580.1.2", "580.1.2", 0},
		{"470.256.2-grid", "470.256.2-grid", 0}, // an edition is chosen only by its exact version
		{"nonsense", "", fault.Usage},
	}
	for _, test := range tests {
		got, err := list.Choose(test.wish)
		if got != test.want || (test.want == "" && !fault.Is(err, test.kind)) || (test.want != "" && err != nil) {
			t.Errorf("Choose(%s) = %q, %v; want %q, %v", test.wish, got, err, test.want, test.kind)
		}
		if want := "default (535.261.03), R470 (470.256.2), R535 (535.261.03)"; test.wish == "R580" &&
			!strings.Contains(fault.Hint(err), want) {
			t.Errorf("Choose(%s) hints %q; want %q in it", test.wish, fault.Hint(err), want)
		}
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	k := target.Kernel{BuildID: "17800.66.78", Board: "lakitu"}
	got := []string{
		cosbucket.HeadersName(k), cosbucket.ToolchainName(k), cosbucket.ToolchainEnvName(k), cosbucket.CommitName(k),
		cosbucket.KernelInfoName(k), cosbucket.VMLinuxName(k), cosbucket.ToolchainPointerName(k),
		cosbucket.ToolchainURLName(k), cosbucket.ToolchainPathName(k),
		cosbucket.DriverVersionsName(k), cosbucket.DriverVersionsBinName(k), cosbucket.DefaultVersionName(k),
		cosbucket.LatestVersionName(k),
		cosbucket.BranchVersionName(k, "R535"), cosbucket.BootName(k), cosbucket.MD5Name(cosbucket.HeadersName(k)),
		cosbucket.RunfileName("535.1.2", target.AMD64), cosbucket.RunfileName("535.1.2", target.ARM64),
		cosbucket.RunfileSumName("535.1.2", target.AMD64),
	}
	const dir = "17800.66.78/lakitu/"
	want := []string{
		dir + "kernel-headers.tgz", dir + "toolchain.tar.xz", dir + "toolchain_env", dir + "kernel_commit",
		dir + "kernel_info", dir + "vmlinux", dir + "toolchain.tar.xz.gcs", dir + "toolchain_url", dir + "toolchain_path",
		dir + "gpu_driver_versions.textproto", dir + "gpu_driver_versions.bin", dir + "gpu_default_version",
		dir + "gpu_latest_version",
		dir + "gpu_R535_version", dir + "prebake-boot.tgz", dir + "kernel-headers.tgz.md5",
		"NVIDIA-Linux-x86_64-535.1.2.run", "NVIDIA-Linux-aarch64-535.1.2.run",
		"sha256/NVIDIA-Linux-x86_64-535.1.2.run.sha256",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("names (-want +got)\n%s", diff)
	}
}

func FuzzParseDriverVersions(f *testing.F) {
	for _, seed := range []string{textproto, "", "gpu_driver_version_info {",
		`gpu_driver_version_info: { supported_driver_versions: [{version: "1.2"}, {label: "R535"}] }`, "x: [1,2", "\xff"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) { checkList(t, cosbucket.ParseDriverVersions, text) })
}

func FuzzParseDriverVersionsBin(f *testing.F) {
	f.Add([]byte(objects["17412.0.9/gpu_driver_versions.bin"]))
	f.Add([]byte("\x0a\x05\x0a\x03\x0a\x01x"))
	f.Add([]byte("\x0a\xff\xff\xff\xff\x0f"))
	f.Fuzz(func(t *testing.T, data []byte) { checkList(t, cosbucket.ParseDriverVersionsBin, data) })
}

// checkList checks what must be true for every list that parse accepts.
func checkList(t *testing.T, parse func([]byte) (cosbucket.DriverList, error), text []byte) {
	list, err := parse(text)
	if err != nil {
		return
	}
	for _, v := range append([]string{list.Default, list.Latest}, list.Versions...) {
		if v != "" && !target.ValidVersion(v) {
			t.Errorf("ParseDriverVersions let %q through", v)
		}
	}
	for branch, v := range list.Branches {
		if got, err := list.Choose(target.Wish(branch)); err != nil || got != v {
			t.Errorf("Choose(%s) = %s, %v; want %s", branch, got, err, v)
		}
	}
}

func FuzzParseVersionFile(f *testing.F) {
	for _, seed := range []string{"535.261.03\n", "", "535", "535.1\r\n", "../x", "535.1\n536.2"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		v, err := cosbucket.ParseVersionFile(text)
		if err == nil && !target.ValidVersion(v) {
			t.Errorf("ParseVersionFile(%q) = %q", text, v)
		}
	})
}

// TestChooseByGPU checks wishes for a GPU type, such as default@NVIDIA_B200. The list is invented, with the schema that
// Google's repository cos/tools defines.
func TestChooseByGPU(t *testing.T) {
	t.Parallel()
	entry := func(gpu string, versions ...string) string {
		text := "gpu_driver_version_info {\n  gpu_device { gpu_type: \"" + gpu + "\" }\n"
		for i := 0; i < len(versions); i += 2 {
			text += "  supported_driver_versions { label: \"" + versions[i] + "\" version: \"" + versions[i+1] + "\" }\n"
		}
		return text + "}\n"
	}
	list, err := cosbucket.ParseDriverVersions([]byte(entry("NO_GPU", "DEFAULT", "550.90.7") + entry("NVIDIA_B200",
		"DEFAULT", "570.133.20", "LATEST", "580.65.6", "R570", "570.133.20") +
		entry("NVIDIA_TESLA_P4", "DEFAULT", "535.230.2", "R535", "535.230.2") + entry("OTHERS", "DEFAULT", "535.230.2",
		"LATEST", "580.65.6", "R550", "550.90.7")))
	if err != nil {
		t.Fatal(err)
	}
	for wish, want := range map[target.Wish]string{
		"default": "535.230.2", "default@NVIDIA_B200": "570.133.20", "latest@NVIDIA_B200": "580.65.6",
		"R570@NVIDIA_B200": "570.133.20", "default@NVIDIA_TESLA_P4": "535.230.2",
		"latest@NVIDIA_TESLA_P4": "", "R550@NVIDIA_B200": "", "default@NVIDIA_L4": "",
	} {
		got, err := list.Choose(wish)
		if got != want || want == "" && (!fault.Is(err, fault.Unsupported) || fault.Hint(err) == "") {
			t.Errorf("Choose(%s) = %q, %v; want %q", wish, got, err, want)
		}
	}
}

// TestGPUTypesAreBounded checks that ParseDriverVersions limits the names and the number of GPU types. They come from a
// bucket, and the server stores them.
func TestGPUTypesAreBounded(t *testing.T) {
	t.Parallel()
	list := func(names ...string) (text string) {
		for _, name := range names {
			text += fmt.Sprintf("gpu_driver_version_info { gpu_device { gpu_type: %q }\n"+
				"supported_driver_versions { label: \"DEFAULT\" version: \"535.230.2\" } }\n", name)
		}
		return text
	}
	many := func(n int) (names []string) {
		for i := range n {
			names = append(names, fmt.Sprintf("NVIDIA_%d", i))
		}
		return names
	}
	odd := []string{"nvidia-l4", "<b>", strings.Repeat("A", 65), "NVIDIA L4"}
	for name, row := range map[string]struct {
		types []string
		want  int
	}{"one": {[]string{"NVIDIA_L4"}, 1}, "odd": {append(odd, "NVIDIA_L4"), 1}, "most": {many(64), 64}} {
		got, err := cosbucket.ParseDriverVersions([]byte(list(row.types...)))
		if err != nil || len(got.GPUs) != row.want {
			t.Errorf("%s: ParseDriverVersions(types %q) = %d types, %v; want %d", name, row.types, len(got.GPUs), err,
				row.want)
		}
	}
	if got, err := cosbucket.ParseDriverVersions([]byte(list(many(65)...))); !fault.Is(err, fault.Unsupported) {
		t.Errorf("ParseDriverVersions(65 types) = %d types, %v; want %v", len(got.GPUs), err, fault.Unsupported)
	}
}
