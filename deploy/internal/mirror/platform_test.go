package mirror

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

func TestPlatform(t *testing.T) {
	t.Parallel()
	amd, arm := platforms[target.AMD64], platforms[target.ARM64]
	for _, row := range []struct{ what, got, want string }{
		{"amd64 apt", amd.aptDir() + amd.aptConf(), "debian"},
		{"arm64 apt", arm.aptDir() + " " + arm.aptConf(), "debian-arm64 APT::Architectures { \"amd64\"; \"arm64\"; };\n"},
		{"amd64 board", amd.board("lakitu-x"), "lakitu-x"},
		{"arm64 board", arm.board("lakitu-x"), "lakitu-arm64"},
		{"amd64 env", amd.env(), toolchainEnv},
		{"arm64 env", arm.env(), "CC=aarch64-cros-linux-gnu-gcc\nCXX=aarch64-cros-linux-gnu-gcc\n"},
		{"packages", strings.Join(arm.aptNames("libcuda1", "nvidia-smi"), " "), "libcuda1:arm64 nvidia-smi:arm64"},
		{"arm64 library", arm.runfileName("usr/lib/aarch64-linux-gnu/nvidia/current/libcuda.so.535.1.2", "535.1.2"),
			"libcuda.so.535.1.2"},
		{"library of the other", arm.runfileName("usr/lib/x86_64-linux-gnu/nvidia/current/libcuda.so.535.1.2", "535.1.2"),
			""},
		{"arm64 compiler", arm.toolchainPick("usr/bin/aarch64-linux-gnu-gcc-12"), "bin/aarch64-cros-linux-gnu-gcc"},
		{"arm64 cc1", arm.toolchainPick("usr/lib/gcc-cross/aarch64-linux-gnu/12/cc1"),
			"lib/gcc-cross/aarch64-linux-gnu/12/cc1"},
		{"arm64 sanitizer", arm.toolchainPick("usr/lib/gcc-cross/aarch64-linux-gnu/12/libasan.a"), ""},
	} {
		if row.got != row.want {
			t.Errorf("%s = %q; want %q", row.what, row.got, row.want)
		}
	}
	got := arm.plainNames(map[string][]string{"libcuda1:arm64": {"1"}})
	if diff := cmp.Diff(map[string][]string{"libcuda1": {"1"}}, got); diff != "" {
		t.Errorf("plainNames() (-want +got):\n%s", diff)
	}
	for name, want := range map[string]bool{
		"linux-headers-6.1.0-47-arm64": true, "linux-headers-6.1.0-47-cloud-arm64": false,
		"linux-headers-6.1.0-47-rt-arm64":    false,
		"linux-headers-6.12.115+deb12-arm64": true, "linux-headers-6.1.0-47-cloud-amd64": false,
	} {
		if _, got := arm.kernel(name); got != want {
			t.Errorf("%s is a kernel for arm64: %t; want %t", name, got, want)
		}
	}
}

func TestKernelNames(t *testing.T) {
	t.Parallel()
	amd := platforms[target.AMD64]
	for release, want := range map[string]string{
		"6.1.0-47-cloud-amd64":         "6.1 47 17800 linux-headers-6.1.0-47-common linux-kbuild-6.1",
		"6.12.117+deb12-cloud-amd64":   "6.12 117 19216 linux-headers-6.12.117+deb12-common linux-kbuild-6.12.117+deb12",
		"6.12.117+deb12-amd64":         "",
		"6.12.117+deb12-rt-amd64":      "",
		"6.12-cloud-amd64":             "", // a metapackage, which only depends on the newest kernel
		"6.12.117-cloud-amd64":         "",
		"6.1.0-1234567-cloud-amd64":    "",
		"6.12.117+deb12-common":        "",
		"6.12.117+deb-cloud-amd64":     "",
		"6.12.117+deb12-x-cloud-amd64": "",
	} {
		k, ok := amd.kernel("linux-headers-" + release)
		if ok != (want != "") {
			t.Errorf("kernel(%s) = %+v, %t; want %q", release, k, ok, want)
		} else if got := fmt.Sprintf("%s %d %d %s %s", k.series, k.abi, k.buildMajor(), k.common.Name, k.kbuild.Name); ok &&
			(got != want || k.image.Name != "linux-image-"+release) {
			t.Errorf("kernel(%s) = %s, image %s; want %s", release, got, k.image.Name, want)
		}
	}
}

// TestSelectKernelsARM64 checks that only one arm64 kernel is selected if nobody asks for more.
func TestSelectKernelsARM64(t *testing.T) {
	t.Parallel()
	all := []kernel{{abi: 47}, {abi: 50}, {abi: 56}}
	for _, row := range []struct {
		abis []int
		want []int
	}{{nil, []int{47}}, {[]int{50, 56}, []int{50, 56}}} {
		picked, err := platforms[target.ARM64].selectKernels(all, row.abis, 3)
		var got []int
		for _, k := range picked {
			got = append(got, k.abi)
		}
		if !slices.Equal(got, row.want) || err != nil {
			t.Errorf("selectKernels(%v) = %v, %v; want %v", row.abis, got, err, row.want)
		}
	}
}

func TestArchitectures(t *testing.T) {
	t.Parallel()
	c := Config{Out: "out", Cache: "cache"}.WithDefaults()
	if err := c.Validate(); err != nil || !slices.Equal(c.Archs, []target.Arch{target.AMD64}) {
		t.Errorf("default = %v, %v; want amd64 alone", c.Archs, err)
	}
	for _, archs := range [][]target.Arch{{"riscv64"}, {target.ARM64, target.ARM64}} {
		c.Archs = archs
		if err := c.Validate(); !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
			t.Errorf("Validate(%v) = %v; want usage with a hint", archs, err)
		}
	}
	c.Archs, c.Board = nil, "lakitu-arm64"
	if err := c.Validate(); !fault.Is(err, fault.Usage) || !strings.Contains(fault.Hint(err), "--arch arm64") {
		t.Errorf("Validate(board lakitu-arm64) = %v; want usage with the way to go", err)
	}
	var r Result
	r.add(Result{Builds: []Build{{BuildID: "1.0.1"}}, Drivers: []Driver{{Version: "1.2"}}, Made: 1})
	r.add(Result{Builds: []Build{{BuildID: "1.0.1", Board: "lakitu-arm64"}}, Drivers: []Driver{{Version: "1.2"}}, Made: 2,
		Cached: 3})
	if len(r.Builds) != 2 || len(r.Drivers) != 1 || r.Made != 3 || r.Cached != 3 {
		t.Errorf("both parts = %+v; want two builds and one driver", r)
	}
}

func TestForeignPackageFile(t *testing.T) {
	t.Parallel()
	a := &apt{dir: t.TempDir()}
	if err := os.Mkdir(filepath.Join(a.dir, "packages"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"libcuda1_1%3a2_arm64.deb", "common_1_all.deb"} {
		if err := os.WriteFile(filepath.Join(a.dir, "packages", name), []byte("deb"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for p, want := range map[pkg]bool{{"libcuda1:arm64", "1:2"}: true, {"libcuda1", "1:2"}: false, {"common", "1"}: true} {
		if _, ok := a.file(p); ok != want {
			t.Errorf("file(%v) is there: %t; want %t", p, ok, want)
		}
	}
}
