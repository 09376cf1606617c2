package gpulist_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/target"
)

// file has the format of NVIDIA's supported-gpus.json. The products in it are real, and the boards are invented.
const file = `{
  "chips": [
    {"devid": "0x1EB8", "name": "Tesla T4", "features": ["runtimepm", "vdpaufeaturesetJ", "kernelopen"]},
    {"devid": "0x1DB1", "name": "Tesla V100-SXM2-16GB", "features": ["vdpaufeaturesetH"]},
    {"devid": "0x1DB1", "subdevid": "0x1307", "subvendorid": "0x10DE", "name": "Tesla V100-SXM2-16GB-LS", "features": []},
    {"devid": "0x2330", "name": "NVIDIA H100 80GB HBM3", "features": ["kernelopen"]},
    {"devid": "0x2330", "subdevid": "0x16C0", "subvendorid": "0x10DE", "name": "NVIDIA H100 80GB HBM3", "features": ["kernelopen", "newer"], "newerField": {}},
    {"devid": "0x27B8", "name": "NVIDIA L4", "features": ["kernelopen"]},
    {"devid": "0x27B8", "subdevid": "0x1733", "subvendorid": "0x10DE", "name": "NVIDIA L4 of a kind", "features": []},
    {"devid": "0x102D", "name": "Tesla K80", "features": [], "legacybranch": "470.xx"}
  ],
  "more": true
}`

func parse(t testing.TB, text string) *gpulist.List {
	t.Helper()
	l, err := gpulist.ParseFile("535.261.03", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// shortForm writes the short form of a list into a statement, reads it again, and returns the result.
func shortForm(t testing.TB, l *gpulist.List) *gpulist.List {
	t.Helper()
	raw, err := json.Marshal(l.Short())
	if err != nil {
		t.Fatal(err)
	}
	got, err := gpulist.ParsePredicate(raw)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestShort(t *testing.T) {
	t.Parallel()
	open := []string{"kernelopen"}
	want := &gpulist.List{Version: "535.261.03", Chips: []gpulist.Chip{
		{Device: "0x102d", Legacy: "470.xx"}, {Device: "0x1db1"}, {Device: "0x1eb8", Features: open},
		{Device: "0x2330", Features: open},
		{Device: "0x27b8", Features: open}, {Device: "0x27b8", SubVendor: "0x10de", SubDevice: "0x1733"},
	}}
	if diff := cmp.Diff(want, shortForm(t, parse(t, file))); diff != "" {
		t.Errorf("Short (-want +got):\n%s", diff)
	}
}

func TestServes(t *testing.T) {
	t.Parallel()
	full := parse(t, file)
	silent := parse(t, strings.ReplaceAll(file, "kernelopen", "other"))
	gpu := func(id string) gpulist.GPU { return gpulist.GPU{Address: "0000:00:04.0", Device: id} }
	rows := []struct {
		name              string
		list              *gpulist.List
		gpu               gpulist.GPU
		open, proprietary bool
	}{
		{"Turing", full, gpu("0x1eb8"), true, true},
		{"Volta", full, gpu("0x1db1"), false, true},
		{"upper case", full, gpu("0x1EB8"), true, true},
		{"legacy", full, gpu("0x102d"), false, false},
		{"board that differs", full, gpulist.GPU{Device: "0x27b8", SubVendor: "0x10de", SubDevice: "0x1733"}, false, true},
		{"board that is not listed", full, gpulist.GPU{Device: "0x27b8", SubVendor: "0x10de", SubDevice: "0xffff"}, true,
			true},
		{"board of another vendor", full, gpulist.GPU{Device: "0x27b8", SubVendor: "0x1028", SubDevice: "0x1733"}, true,
			true},
		{"newer than the list", full, gpu("0x2901"), true, true},
		{"older than the list", full, gpu("0x15f8"), false, true},
		{"list silent about open, Turing", silent, gpu("0x1eb8"), true, true},
		{"list silent about open, Volta", silent, gpu("0x1db1"), false, true},
		{"no list, Turing", nil, gpu("0x1e02"), true, true},
		{"no list, Volta", nil, gpu("0x1df6"), false, true},
		{"no list, no id", nil, gpu(""), false, true},
	}
	for _, row := range rows {
		lists := map[string]*gpulist.List{"": row.list}
		if row.list != nil {
			lists["short: "] = shortForm(t, row.list)
		}
		for kind, l := range lists {
			for f, want := range map[target.Flavour]bool{target.Open: row.open, target.Proprietary: row.proprietary} {
				got, why := l.Serves(row.gpu, f)
				if got != want || got != (why == "") {
					t.Errorf("%s%s: Serves(%s, %s) = %v, %q; want %v", kind, row.name, row.gpu, f, got, why, want)
				}
			}
		}
	}
}

func TestChoose(t *testing.T) {
	t.Parallel()
	l := parse(t, file)
	open, closed := gpulist.Offer{Flavour: target.Open, List: l}, gpulist.Offer{Flavour: target.Proprietary, List: l}
	unknown := gpulist.Offer{Flavour: target.Open}
	gpus := func(ids ...string) (all []gpulist.GPU) {
		for _, id := range ids {
			all = append(all, gpulist.GPU{Address: "0000:00:04.0", Device: id})
		}
		return all
	}
	rows := []struct {
		name   string
		gpus   []gpulist.GPU
		offers []gpulist.Offer
		want   int
		kind   fault.Kind // Internal means no error
		text   string
	}{
		{"Turing takes open", gpus("0x1eb8"), []gpulist.Offer{closed, open}, 1, fault.Internal, ""},
		{"Volta takes proprietary", gpus("0x1db1"), []gpulist.Offer{open, closed}, 1, fault.Internal, ""},
		{"both in one node take proprietary", gpus("0x1eb8", "0x1db1"), []gpulist.Offer{open, closed}, 1, fault.Internal, ""},
		{"only proprietary", gpus("0x1eb8"), []gpulist.Offer{closed}, 0, fault.Internal, ""},
		{"no GPU", nil, []gpulist.Offer{closed, open}, 1, fault.Internal, ""},
		{"no GPU, only proprietary", nil, []gpulist.Offer{closed}, 0, fault.Internal, ""},
		{"no list", gpus("0x1eb8"), []gpulist.Offer{unknown}, 0, fault.Internal, ""},
		{"Volta, only open", gpus("0x1db1"), []gpulist.Offer{open}, 0, fault.Unsupported,
			"the open modules of driver 535.261.03 do not drive GPU 0000:00:04.0 (10de:1db1)"},
		{"Volta, only open, no list", gpus("0x1db1"), []gpulist.Offer{unknown}, 0, fault.Unsupported, "older"},
		{"legacy", gpus("0x102d"), []gpulist.Offer{open, closed}, 0, fault.Unsupported, "needs branch 470.xx"},
		{"nothing", gpus("0x1eb8"), nil, 0, fault.NoArtifact, "no flavour"},
	}
	for _, row := range rows {
		got, err := gpulist.Choose(row.gpus, row.offers)
		if row.kind == fault.Internal {
			if err != nil || got != row.want {
				t.Errorf("%s: Choose = %d, %v; want %d", row.name, got, err, row.want)
			}
			continue
		}
		if !fault.Is(err, row.kind) || !strings.Contains(err.Error(), row.text) || row.kind == fault.Unsupported &&
			fault.Hint(err) == "" {
			t.Errorf("%s: Choose = %d, %v; want kind %v, text %q and a hint", row.name, got, err, row.kind, row.text)
		}
	}
}

func TestDrives(t *testing.T) {
	t.Parallel()
	l := parse(t, file)
	for _, row := range []struct {
		gpuType           string
		open, proprietary bool
	}{
		{"NVIDIA_TESLA_T4", true, true}, {"NVIDIA_TESLA_V100", false, true}, {"NVIDIA_H100_80GB", true, true},
		{"NVIDIA_L4", true, true},
		{"NVIDIA_TESLA_K80", false, false}, {"NVIDIA_H10", false, false}, {"NVIDIA_B200", false, false},
		{"NO_GPU", false, false}, {"NVIDIA", false, false}, {"", false, false},
	} {
		if open, proprietary := l.Drives(row.gpuType, target.Open), l.Drives(row.gpuType,
			target.Proprietary); open != row.open || proprietary != row.proprietary {
			t.Errorf("Drives(%q) = %v, %v; want %v, %v", row.gpuType, open, proprietary, row.open, row.proprietary)
		}
	}
	if (*gpulist.List)(nil).Drives("NVIDIA_L4", target.Open) {
		t.Error("Drives of a nil list = true; want false")
	}
}

// TestParseLeavesOut checks that ParseFile leaves out an entry that it cannot read, and keeps the others.
func TestParseLeavesOut(t *testing.T) {
	t.Parallel()
	odd := strings.Replace(file, `"chips": [`,
		`"chips": [{"devid":"0x12345"},{"devid":"0x1eb8","features":["a b"]},{"devid":"0x1eb8","features":"x"},`, 1)
	got := parse(t, odd)
	if diff := cmp.Diff(parse(t, file).Chips, got.Chips); diff != "" || len(got.LeftOut) != 3 {
		t.Errorf("left out %q; want three, and the others as they are (-want +got):\n%s", got.LeftOut, diff)
	}
	many := parse(t, strings.Replace(file, `"chips": [`, `"chips": [`+strings.Repeat(`{"devid":""},`, 1000), 1))
	if len(many.LeftOut) != 20 {
		t.Errorf("LeftOut has %d entries; want 20", len(many.LeftOut))
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	chip := func(s string) string { return `{"chips":[` + s + `]}` }
	for name, text := range map[string]string{
		"empty": "", "not JSON": "chips", "no chips": `{}`, "id too long": chip(`{"devid":"0x12345"}`),
		"id without 0x": chip(`{"devid":"1eb8"}`),
		"no id":         chip(`{"name":"x"}`), "board without form": chip(`{"devid":"0x1eb8","subdevid":"x"}`),
		"name too long":       chip(`{"devid":"0x1eb8","name":"` + strings.Repeat("x", 200) + `"}`),
		"feature with blanks": chip(`{"devid":"0x1eb8","features":["a b"]}`),
		"legacy":              chip(`{"devid":"0x1eb8","legacybranch":"../x"}`),
		"too many":            chip(strings.Repeat(`{"devid":"0x1eb8"},`, 20_000) + `{"devid":"0x1eb8"}`),
		"too long":            strings.Repeat(" ", gpulist.MaxFile+1),
	} {
		if l, err := gpulist.ParseFile("535.1.1", []byte(text)); !fault.Is(err, fault.Unverified) || fault.Hint(err) == "" {
			t.Errorf("%s: ParseFile = %v, %v; want kind unverified and a hint", name, l, err)
		}
	}
	if l, err := gpulist.ParseFile("latest", []byte(file)); !fault.Is(err, fault.Unverified) {
		t.Errorf("ParseFile(latest) = %v, %v; want kind unverified", l, err)
	}
	for _, text := range []string{"", "[]", `{"version":"535.1.1"}`, `{"version":"x","gpus":[{"device":"0x1eb8"}]}`} {
		if l, err := gpulist.ParsePredicate([]byte(text)); !fault.Is(err, fault.Unverified) {
			t.Errorf("ParsePredicate(%q) = %v, %v; want kind unverified", text, l, err)
		}
	}
}

func FuzzParseFile(f *testing.F) {
	f.Add([]byte(file))
	f.Add([]byte(`{"chips":[{"devid":"0x1eb8","features":null}]}`))
	f.Add([]byte(`{"chips":[{"devid":"0x1eb8","name":"A","legacybranch":"470.xx"},{"devid":"0x1eb8","name":"B"}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		l, err := gpulist.ParseFile("535.1.1", text)
		if err != nil {
			if !fault.Is(err, fault.Unverified) {
				t.Errorf("ParseFile = %v of kind %v; want unverified", err, fault.Of(err))
			}
			return
		}
		// The short form of a list must give the same answers as the list. The short form of a short form must be the same.
		s := shortForm(t, l)
		if diff := cmp.Diff(s, shortForm(t, s)); diff != "" {
			t.Errorf("short form of the short form (-want +got):\n%s", diff)
		}
		for _, c := range l.Chips {
			g := gpulist.GPU{Device: c.Device, SubVendor: c.SubVendor, SubDevice: c.SubDevice}
			for _, f := range []target.Flavour{target.Open, target.Proprietary} {
				a, why := l.Serves(g, f)
				if b, other := s.Serves(g, f); a != b {
					t.Errorf("Serves(%+v, %s) = %v %s; the short form says %v %s", g, f, a, why, b, other)
				}
			}
		}
	})
}
