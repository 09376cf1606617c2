package target_test

import (
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/target"
)

func TestParseKernel(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name, buildID, board string
		arch                 target.Arch // "" means an error
	}{
		{"x86", "17800.66.78", "lakitu", target.AMD64},
		{"arm", "17800.66.78", "lakitu-arm64", target.ARM64},
		{"two numbers", "17800.66", "lakitu", ""},
		{"four numbers", "1.2.3.4", "lakitu", ""},
		{"path in build", "../1.2.3", "lakitu", ""},
		{"path in board", "1.2.3", "../lakitu", ""},
		{"empty board", "1.2.3", "", ""},
		{"newline", "1.2.3\n", "lakitu", ""},
	}
	for _, row := range rows {
		k, err := target.ParseKernel(row.buildID, row.board)
		if (err == nil) != (row.arch != "") || k.Arch != row.arch {
			t.Errorf("%s: ParseKernel(%q, %q) = %+v, %v; want arch %q", row.name, row.buildID, row.board, k, err, row.arch)
		}
		if err == nil && k.String() != row.buildID+"/"+row.board {
			t.Errorf("%s: String = %q", row.name, k)
		}
	}
}

func TestParseDriver(t *testing.T) {
	t.Parallel()
	d, err := target.ParseDriver("535.261.03", "open")
	if err != nil || d.Branch() != "R535" || d.String() != "535.261.03-open" {
		t.Errorf("ParseDriver = %v (branch %s), %v; want 535.261.03-open of R535", d, d.Branch(), err)
	}
	// These names are from runfiles in the GRID folders of Google's nvidia-drivers-*-public buckets.
	for _, version := range []string{"535.129.03-grid", "550.54.15-grid-gcp", "470.103.01-vgpu-kvm",
		"535.129.03-no-compat32"} {
		d, err := target.ParseDriver(version, "proprietary")
		number, _, _ := strings.Cut(version, "-")
		if want := (target.Driver{Version: number, Flavour: target.Proprietary}); err != nil || d.Modules() != want ||
			d.Branch() != "R"+number[:3] {
			t.Errorf("ParseDriver(%s) = %v of %s, modules %v, %v; want modules %v", version, d, d.Branch(), d.Modules(), err,
				want)
		}
	}
	for _, row := range [][2]string{
		{"535", "open"}, {"535.x", "open"}, {"535.261.03", "closed"}, {"", ""}, {"535.1/..", "open"},
		{"535.261.03-open", "open"}, {"535.261.03-grid-proprietary", "open"}, {"535.261.03-", "open"},
		{"535.261.03-Grid", "open"}, {"535.261.03-a-b-c", "open"}, {"535.261.03-..", "open"},
	} {
		if d, err := target.ParseDriver(row[0], row[1]); err == nil {
			t.Errorf("ParseDriver(%q, %q) = %v; want an error", row[0], row[1], d)
		}
	}
}

func TestParseWish(t *testing.T) {
	t.Parallel()
	rows := []struct {
		in            string
		ok            bool
		exact, branch bool
	}{
		{"default", true, false, false},
		{"latest", true, false, false},
		{"R535", true, false, true},
		{"535.261.03", true, true, false},
		{"r535", false, false, false},
		{"newest", false, false, false},
		{"", false, false, false},
	}
	for _, row := range rows {
		w, err := target.ParseWish(row.in)
		_, exact := w.Exact()
		_, branch := w.BranchName()
		if (err == nil) != row.ok || exact != row.exact || branch != row.branch {
			t.Errorf("ParseWish(%q) = %q, %v (exact %v, branch %v); want %+v", row.in, w, err, exact, branch, row)
		}
	}
}

func TestCompareVersions(t *testing.T) {
	t.Parallel()
	ordered := []string{"470.256.02", "535.9", "535.54.03", "535.261", "535.261.03", "535.261.03-grid", "535.261.03-vgpu",
		"550.54.14", "1000.1"}
	for i, a := range ordered {
		for j, b := range ordered {
			want := 0
			if i < j {
				want = -1
			} else if i > j {
				want = 1
			}
			if got := target.CompareVersions(a, b); got != want {
				t.Errorf("CompareVersions(%s, %s) = %d; want %d", a, b, got, want)
			}
		}
	}
}

func TestParseFingerprint(t *testing.T) {
	t.Parallel()
	good := "sha256:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
	f, err := target.ParseFingerprint(good)
	if err != nil || f.Short() != "0011223344556677" {
		t.Errorf("ParseFingerprint = %q (short %q), %v", f, f.Short(), err)
	}
	for _, bad := range []string{"", good[7:], good[:70], "sha512:" + good[7:],
		"sha256:00112233445566778899AABBCCDDEEFF00112233445566778899AABBCCDDEEFF"} {
		if _, err := target.ParseFingerprint(bad); err == nil {
			t.Errorf("ParseFingerprint(%q) succeeded; want an error", bad)
		}
	}
}

func TestParseGPUWish(t *testing.T) {
	t.Parallel()
	for text, ok := range map[string]bool{
		"default": true, "535.261.03": true, "default@NVIDIA_L4": true, "latest@NVIDIA_H100_80GB": true,
		"R535@NVIDIA_TESLA_P4": true,
		"535.261.03@NVIDIA_L4": false, "default@": false, "default@nvidia": false, "default@A@B": false, "@NVIDIA_L4": false,
		"": false,
	} {
		w, err := target.ParseGPUWish(text)
		if (err == nil) != ok {
			t.Errorf("ParseGPUWish(%q) = %q, %v; want success: %t", text, w, err, ok)
		}
	}
	for label, want := range map[string]target.Wish{
		"default": "default", "latest": "latest", "R580": "R580", "535.261.03": "535.261.03",
		"535.261.03-grid": "535.261.03-grid", "default.NVIDIA_H100_80GB": "default@NVIDIA_H100_80GB",
		"R580.NVIDIA_L4": "R580@NVIDIA_L4", "": "", "default@NVIDIA_L4": "", "default.": "", "default.l4": "",
		"535.261.03.NVIDIA_L4": "", "NVIDIA_L4": "", "R580.": "", "535": "",
	} {
		if w, err := target.ParseWishLabel(label); w != want || (err == nil) != (want != "") {
			t.Errorf("ParseWishLabel(%q) = %q, %v; want %q", label, w, err, want)
		}
	}
	if w, gpu := target.Wish("default@NVIDIA_L4").GPU(); w != target.Default || gpu != "NVIDIA_L4" {
		t.Errorf("GPU() = %q, %q", w, gpu)
	}
}
