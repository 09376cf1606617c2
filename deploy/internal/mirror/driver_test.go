package mirror

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// index returns the versions that apt would list for an archive with these driver releases.
func index(open []string, all ...string) map[string][]string {
	v := map[string][]string{sourcePackage: all, openSourcePackage: open}
	for _, name := range driverPackages {
		v[name] = all
	}
	v["nvidia-modprobe"] = []string{"535.309.01-0+deb12u1", "535.161.07-1~deb12u1", "530.1.1-1"}
	v["nvidia-persistenced"] = []string{"535.171.04-1~deb12u1"}
	return v
}

func TestSelectReleases(t *testing.T) {
	t.Parallel()
	const stable, newer = "535.261.03-1", "535.309.01-0+deb12u1"
	got, err := selectReleases(wholeReleases(index([]string{stable}, newer, stable), ""))
	if err != nil || len(got) != 2 {
		t.Fatalf("selectReleases = %+v, %v; want two releases", got, err)
	}
	for i, want := range []struct {
		version  string
		flavours []target.Flavour
		modprobe string
	}{
		{"535.261.03", []target.Flavour{target.Proprietary, target.Open}, "535.161.07-1~deb12u1"},
		{"535.309.01", []target.Flavour{target.Proprietary}, newer},
	} {
		r := got[i]
		if r.version != want.version || !slices.Equal(r.flavours(), want.flavours) {
			t.Errorf("release %d = %s %v; want %s %v", i, r.version, r.flavours(), want.version, want.flavours)
		}
		if !slices.Contains(r.packages, pkg{"nvidia-modprobe", want.modprobe}) {
			t.Errorf("release %s has packages %v; want nvidia-modprobe %s", r.version, r.packages, want.modprobe)
		}
	}
	if got, err := selectReleases(wholeReleases(index([]string{stable}, stable), "")); err != nil || len(got) != 1 {
		t.Errorf("selectReleases(one) = %+v, %v; want one release", got, err)
	}
	if _, err := selectReleases(wholeReleases(index(nil, stable), "")); !fault.Is(err, fault.InputMissing) {
		t.Errorf("selectReleases(no open source) = %v; want input-missing", err)
	}
	lacking := index([]string{stable}, newer, stable)
	lacking["libcuda1"] = []string{stable}
	if got, err := selectReleases(wholeReleases(lacking, "")); err != nil || len(got) != 1 ||
		got[0].version != "535.261.03" {
		t.Errorf("selectReleases(newer without libcuda1) = %+v, %v; want the stable one", got, err)
	}
}

func TestLine(t *testing.T) {
	t.Parallel()
	const tesla = line("tesla-535")
	for plain, want := range map[string]string{
		"nvidia-kernel-source": "nvidia-tesla-535-kernel-source", "nvidia-kernel": "nvidia-tesla-535-kernel",
		"nvidia-smi":          "nvidia-tesla-535-smi",
		"firmware-nvidia-gsp": "firmware-nvidia-tesla-535-gsp", "libcuda1": "libnvidia-tesla-535-cuda1",
		"libnvidia-ml1": "libnvidia-tesla-535-ml1",
		"libnvcuvid1":   "libnvidia-tesla-535-nvcuvid1", "nvidia-modprobe": "nvidia-modprobe",
	} {
		if got := tesla.packageName(plain); got != want {
			t.Errorf("%s.packageName(%s) = %s; want %s", tesla, plain, got, want)
		}
		if got := line("").packageName(plain); got != plain {
			t.Errorf(`line("").packageName(%s) = %s; want the same name`, plain, got)
		}
	}
	// Only the line "" has the package nvidia-cuda-mps, so a release of the line tesla-535 is complete without it.
	versions := index(nil, "535.274.02-1~deb13u1")
	delete(versions, "nvidia-cuda-mps")
	if got := wholeReleases(versions, ""); len(got) > 0 {
		t.Errorf("wholeReleases(without nvidia-cuda-mps) = %+v; want none", got)
	}
	got := wholeReleases(versions, tesla)
	if len(got) != 1 || got[0].version != "535.274.02" || got[0].open {
		t.Fatalf("wholeReleases of %s = %+v; want 535.274.02, proprietary", tesla, got)
	}
	for i, p := range got[0].packages {
		got[0].packages[i].Name = tesla.packageName(p.Name)
	}
	if v, only := got[0].sourceVersion(), got[0].onlySources(); v != "535.274.02-1~deb13u1" || len(only) != 1 {
		t.Errorf("source version %q, sources %v; want 535.274.02-1~deb13u1 and one package", v, only)
	}
}

// fakeApt puts a program apt-cache into PATH that prints the given versions. Each line of madison has the form ARCHIVE
// PACKAGE=VERSION, with the archive "own" or "next".
func fakeApt(t *testing.T, madison string) (own, next *apt) {
	t.Helper()
	bin, dir := t.TempDir(), t.TempDir()
	const script = "#!/bin/sh\ncat \"$APT_CONFIG.madison\"\n"
	if err := os.WriteFile(filepath.Join(bin, "apt-cache"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	all := map[string]*apt{}
	for _, name := range []string{"own", "next"} {
		all[name] = &apt{conf: filepath.Join(dir, name), dir: filepath.Join(dir, name+"-folder")}
	}
	files := map[string]string{}
	for line := range strings.Lines(madison) {
		where, packages, _ := strings.Cut(strings.TrimSpace(line), " ")
		name, version, _ := strings.Cut(packages, "=")
		files[where] += name + " | " + version + " | m Packages\n"
	}
	for name, text := range files {
		if err := os.WriteFile(all[name].conf+".madison", []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return all["own"], all["next"]
}

func TestFindDrivers(t *testing.T) {
	var madison strings.Builder
	add := func(where string, l line, version string, open bool) {
		for _, name := range append([]string{sourcePackage}, driverPackages...) {
			if !l.hasNo(name) {
				fmt.Fprintf(&madison, "%s %s=%s\n", where, l.packageName(name), version)
			}
		}
		if open {
			fmt.Fprintf(&madison, "%s %s=%s\n", where, openSourcePackage, version)
		}
	}
	add("own", "", "535.309.01-0+deb12u1", false)
	add("own", "", "535.261.03-1", true)
	add("next", "", "550.163.01-2", true)
	add("next", "tesla-535", "535.274.02-1~deb13u1", false)
	own, next := fakeApt(t, madison.String())
	for _, row := range []struct {
		name      string
		branches  []string
		neighbour bool
		want      string // versions, each with its archive
		latest    string
		err       string
	}{
		{name: "default", want: "535.261.03 own, 535.309.01 own", latest: "535.309.01"},
		{name: "own branch", branches: []string{"R535"}, want: "535.261.03 own, 535.309.01 own", latest: "535.309.01"},
		{name: "next branch", branches: []string{"R550"}, want: "550.163.01 next", latest: "550.163.01"},
		{name: "both", branches: []string{"R535", "R550"}, want: "535.261.03 own, 535.309.01 own, 550.163.01 next",
			latest: "550.163.01"},
		{name: "both, the other default", branches: []string{"R550", "R535"},
			want: "550.163.01 next, 535.261.03 own, 535.309.01 own", latest: "550.163.01"},
		{name: "neighbour", neighbour: true, want: "535.261.03 own, 535.274.02 next, 535.309.01 own", latest: "535.309.01"},
		{name: "no such branch", branches: []string{"R535", "R999"}, err: "R999"},
		{name: "no neighbour", branches: []string{"R550"}, neighbour: true, err: "tesla-550"},
	} {
		m := &maker{Config: Config{Branches: row.branches, Neighbour: row.neighbour}, platform: platforms[target.AMD64],
			apt: own, next: next}
		releases, err := m.findDrivers(t.Context())
		if row.err != "" {
			if !fault.Is(err, fault.InputMissing) || !strings.Contains(err.Error(), row.err) || fault.Hint(err) == "" {
				t.Errorf("%s: %v; want input-missing that names %s, with a hint", row.name, err, row.err)
			}
			continue
		}
		var got []string
		for _, r := range releases {
			got = append(got, r.version+" "+map[*apt]string{own: "own", next: "next"}[r.apt])
			if base, ok := baseOf(r, releases); !ok || target.Branch(base.version) != target.Branch(r.version) || !base.open {
				t.Errorf("%s: the base of %s is %s", row.name, r.version, base.version)
			}
		}
		if err != nil || strings.Join(got, ", ") != row.want || latestOf(releases).version != row.latest {
			t.Errorf("%s: %v, latest %s, %v; want %s, %s", row.name, got, latestOf(releases).version, err, row.want, row.latest)
		}
		// The default driver for the clang-built kernel is from the machine's own Debian release.
		if clang := m.clangReleases(releases); len(row.branches) != 1 && clang[0].version != "535.309.01" {
			t.Errorf("%s: the default for the clang-built kernel is %s; want 535.309.01", row.name, clang[0].version)
		}
	}
}

func TestSelectKernels(t *testing.T) {
	t.Parallel()
	var own []kernel
	for _, abi := range []int{47, 50, 53, 56} {
		own = append(own, kernel{series: ownSeries, abi: abi})
	}
	many := append(slices.Clone(own), kernel{series: ownSeries, abi: 57}, kernel{series: ownSeries, abi: 58})
	both := append(slices.Clone(own), kernel{series: "6.12", abi: 115}, kernel{series: "6.12", abi: 117})
	tests := []struct {
		all   []kernel
		abis  []int
		count int
		want  string
		kind  fault.Kind
	}{
		{own, nil, 3, "47 50 56", 0},
		{own, nil, 2, "47 56", 0},
		{own, nil, 4, "47 50 53 56", 0},
		{own[:3], nil, 0, "47 50 53", 0},
		{many, nil, 0, "47 50 57 58", 0},
		{many, nil, 5, "47 50 53 57 58", 0},
		{own, nil, 5, "", fault.InputMissing},
		{own, []int{56, 50}, 3, "50 56", 0},
		{own, []int{48}, 3, "", fault.InputMissing},
		{both, nil, 3, "47 50 56 117", 0},
		{both, nil, 5, "", fault.InputMissing},
		{both, []int{50}, 3, "50 117", 0},
		{both, []int{50, 115}, 3, "50 115", 0},
		{both, []int{115}, 3, "115", 0},
		{both[4:], nil, 3, "117", 0},
	}
	for _, test := range tests {
		picked, err := platforms[target.AMD64].selectKernels(test.all, test.abis, test.count)
		var got []string
		for _, k := range picked {
			got = append(got, fmt.Sprint(k.abi))
		}
		if strings.Join(got, " ") != test.want || test.want == "" && !fault.Is(err, test.kind) {
			t.Errorf("selectKernels(%d kernels, %v, %d) = %v, %v; want %q", len(test.all), test.abis, test.count, got, err,
				test.want)
		}
	}
}

func TestManifest(t *testing.T) {
	t.Parallel()
	in := tree{
		"libcuda.so":               {link: "libcuda.so.1"},
		"libcuda.so.1":             {link: "libcuda.so.535.1.2"},
		"libcuda.so.535.1.2":       {mode: 0o644, data: []byte{1}},
		"libnvidia-ml.so.1":        {link: "libnvidia-ml.so.535.1.2"},
		"libnvidia-ml.so.535.1.2":  {mode: 0o644, data: []byte{1}},
		"libnvcuvid.so.535.1.2":    {mode: 0o644, data: []byte{1}},
		"kernel/nvidia/nv.c":       {mode: 0o644, data: []byte{1}},
		"kernel/Kbuild":            {mode: 0o644, data: []byte{1}},
		"kernel-open/nvidia-uvm/x": {dir: true},
		"firmware/gsp_tu10x.bin":   {mode: 0o644, data: []byte{1}},
		"nvidia-smi":               {mode: 0o755, data: []byte{1}},
		"nvidia-modprobe":          {mode: 0o755, data: []byte{1}},
		"nvidia-installer":         {mode: 0o755, data: []byte{1}},
		"LICENSE":                  {mode: 0o644, data: []byte{1}},
	}
	lines := strings.Split(strings.TrimSuffix(manifest(in, "x86_64", "535.1.2"), "\n"), "\n")
	if lines[1] != "535.1.2" || len(lines) < 8 {
		t.Fatalf("manifest header is %q", lines)
	}
	want := []string{
		"LICENSE 0644 DOCUMENTATION ./",
		"firmware/gsp_tu10x.bin 0644 FIRMWARE",
		"kernel/Kbuild 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:proprietary",
		"kernel/nvidia/nv.c 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:proprietary",
		"libcuda.so 0000 CUDA_SYMLINK NATIVE ./ libcuda.so.1",
		"libcuda.so.1 0000 CUDA_SYMLINK NATIVE ./ libcuda.so.535.1.2",
		"libcuda.so.535.1.2 0755 CUDA_LIB NATIVE ./",
		"libnvcuvid.so.535.1.2 0755 NVCUVID_LIB NATIVE",
		"libnvidia-ml.so.1 0000 UTILITY_LIB_SYMLINK NATIVE libnvidia-ml.so.535.1.2",
		"libnvidia-ml.so.535.1.2 0755 UTILITY_LIB NATIVE",
		"nvidia-installer 0755 INSTALLER_BINARY",
		"nvidia-modprobe 4755 NVIDIA_MODPROBE bin/",
		"nvidia-smi 0755 UTILITY_BINARY",
	}
	if diff := cmp.Diff(want, lines[8:]); diff != "" {
		t.Errorf("manifest (-want +got)\n%s", diff)
	}
}

func TestRunfileName(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"usr/lib/x86_64-linux-gnu/nvidia/current/libcuda.so.535.1.2":   "libcuda.so.535.1.2",
		"usr/lib/x86_64-linux-gnu/nvidia/current/libcuda.so.1":         "",
		"usr/lib/nvidia/current/nvidia-smi":                            "nvidia-smi",
		"usr/lib/nvidia/tesla-535/nvidia-smi":                          "nvidia-smi",
		"usr/lib/x86_64-linux-gnu/nvidia/tesla-535/libcuda.so.535.1.2": "libcuda.so.535.1.2",
		"usr/bin/nvidia-modprobe":                                      "nvidia-modprobe",
		"usr/sbin/nvidia-cuda-mps-server":                              "nvidia-cuda-mps-server",
		"lib/firmware/nvidia/535.1.2/gsp_tu10x.bin":                    "firmware/gsp_tu10x.bin",
		"lib/firmware/nvidia/530.1.2/gsp_tu10x.bin":                    "",
		"usr/share/doc/nvidia-smi/copyright":                           "",
	} {
		if got := platforms[target.AMD64].runfileName(in, "535.1.2"); got != want {
			t.Errorf("runfileName(%s) = %q; want %q", in, got, want)
		}
	}
}

func TestSupportedGPUs(t *testing.T) {
	t.Parallel()
	readme := "Contents\nAppendix A. Supported NVIDIA GPU Products\n...\n\nAppendix A. Supported NVIDIA GPU " +
		"Products\n____\n\nA1. CURRENT NVIDIA GPUS\n\n" +
		" NVIDIA GPU product      Device PCI ID*  VDPAU features\n ------  ----  ---\n" +
		" NVIDIA L4                                        27B8 10DE 16CA  K\n NVIDIA TITAN RTX   1E02            J\n" +
		"\nBelow are the legacy GPUs that\n NVIDIA GeForce OLD   0001            A\n"
	var got struct {
		Chips []struct{ DevID, SubDevID, SubVendorID, Name string }
	}
	if err := json.Unmarshal([]byte(supportedGPUs([]byte(readme))), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Chips) != 2 || got.Chips[0].Name != "NVIDIA TITAN RTX" || got.Chips[1].SubDevID != "0x16CA" ||
		got.Chips[1].SubVendorID != "0x10DE" {
		t.Errorf("supportedGPUs = %+v; want TITAN RTX and L4", got.Chips)
	}
	if got := supportedGPUs([]byte("no table")); got != "" {
		t.Errorf("supportedGPUs(no table) = %q; want nothing", got)
	}
}

func TestDriverVersions(t *testing.T) {
	t.Parallel()
	releases := []release{{version: "535.261.03", open: true}, {version: "535.309.01"}}
	list, err := cosbucket.ParseDriverVersions([]byte(driverVersions(releases)))
	want := cosbucket.DriverList{
		Default: "535.261.03", Latest: "535.309.01",
		Branches: map[string]string{"R535": "535.309.01"}, Versions: []string{"535.261.03", "535.309.01"},
	}
	if diff := cmp.Diff(want, list); err != nil || diff != "" {
		t.Errorf("driverVersions: %v (-want +got)\n%s", err, diff)
	}
	list, err = cosbucket.ParseDriverVersions([]byte(driverVersions(append(releases,
		release{version: "550.163.01", open: true}))))
	want = cosbucket.DriverList{
		Default: "535.261.03", Latest: "550.163.01", Branches: map[string]string{"R535": "535.309.01", "R550": "550.163.01"},
		Versions: []string{"535.261.03", "535.309.01", "550.163.01"},
	}
	if diff := cmp.Diff(want, list); err != nil || diff != "" {
		t.Errorf("driverVersions of two branches: %v (-want +got)\n%s", err, diff)
	}
}

func TestFixHeader(t *testing.T) {
	t.Parallel()
	script := func(kb, skip, option string) string {
		return "#!/bin/sh\nskip=" + skip + "\n\t" + option + ")\n\techo Uncompressed size: " + kb +
			" KB\n  if test \"$leftspace\" -lt " + kb + "; then\n   echo (" + kb + " KB)\neval $finish; exit $res\n"
	}
	payload := "\x28\xb5\x2f\xfd 500 KB"
	got, err := fixHeader([]byte(script("500", `"715"`, "--noexec")+payload), tree{"a": {data: make([]byte, 2049)}})
	if want := script("3", "715", "--noexec|-x|--extract-only") + payload; err != nil || string(got) != want {
		t.Errorf("fixHeader = %q, %v; want %q", got, err, want)
	}
	if _, err := fixHeader([]byte("#!/bin/sh\n"), nil); err == nil {
		t.Error("fixHeader(no header) succeeded")
	}
}

func TestRebuilt(t *testing.T) {
	t.Parallel()
	k := kernel{release: "6.1.0-1-cloud-amd64"}
	in := tree{}
	dir := "usr/src/linux-headers-" + k.release + "/include/generated/"
	in.addFile(dir+"compile.h", "#define LINUX_COMPILE_BY\t\"debian-kernel\"\n#define LINUX_COMPILER\t\"gcc\"\n")
	changeCompileInfo(in, k, epoch)
	if got, want := string(in[dir+
		"compile.h"].data), "#define LINUX_COMPILE_BY\t\"rebuild\"\n#define LINUX_COMPILER\t\"gcc\"\n"; got != want {
		t.Errorf("compile.h = %q; want %q", got, want)
	}
	if got, want := string(in[dir+
		"utsversion.h"].data), "#define UTS_VERSION \"#2 SMP PREEMPT_DYNAMIC Thu Jan  1 00:00:00 UTC 2026\"\n"; got != want {
		t.Errorf("utsversion.h = %q; want %q", got, want)
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	good := Config{Out: "o", Cache: "c"}.WithDefaults()
	if err := good.Validate(); err != nil {
		t.Errorf("Validate(defaults) = %v", err)
	}
	for name, change := range map[string]func(*Config){
		"no out":                  func(c *Config) { c.Out = "" },
		"one kernel":              func(c *Config) { c.Kernels = 1 },
		"board":                   func(c *Config) { c.Board = "../x" },
		"another arch":            func(c *Config) { c.Board = "lakitu-arm64" },
		"series":                  func(c *Config) { c.Series = []string{"6.6"} },
		"branch":                  func(c *Config) { c.Branches = []string{"550"} },
		"branch twice":            func(c *Config) { c.Branches = []string{"R550", "R550"} },
		"arm64 of another branch": func(c *Config) { c.Archs, c.Branches = []target.Arch{target.ARM64}, []string{"R550"} },
		"arm64 neighbour":         func(c *Config) { c.Archs, c.Neighbour = []target.Arch{target.ARM64}, true },
		"series twice":            func(c *Config) { c.Series = []string{"6.12", "6.12"} },
		"arm64 of 6.12":           func(c *Config) { c.Archs, c.Series = []target.Arch{target.ARM64}, []string{"6.12"} },
	} {
		c := good
		change(&c)
		if err := c.Validate(); err == nil {
			t.Errorf("Validate(%s) succeeded", name)
		}
	}
}
