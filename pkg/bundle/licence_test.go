package bundle

import (
	"bytes"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

func TestLicenceIsStated(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		flavour          target.Flavour
		modules, all     string
		needs, tooLittle Redistribution
	}{
		{target.Open, LicenceOpen, "(GPL-2.0-only OR MIT) AND LicenseRef-NVIDIA-driver", RedistributeUserspace,
			RedistributeNone},
		{target.Proprietary, LicenceNVIDIA, LicenceNVIDIA, RedistributeAll, RedistributeUserspace},
	} {
		id := sampleID()
		id.Driver.Flavour = row.flavour
		img, err := Image(id, sampleLayers(t))
		if err != nil {
			t.Fatal(err)
		}
		m, err := img.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		for key, want := range map[string]string{
			AnnotationModulesLicence: row.modules, AnnotationUserspaceLicence: LicenceNVIDIA,
			AnnotationRedistribution: string(row.needs), "org.opencontainers.image.licenses": row.all,
		} {
			if got := m.Annotations[key]; got != want {
				t.Errorf("Image(%s) annotation %s = %q; want %q", row.flavour, key, got, want)
			}
		}
		raw, err := img.RawManifest()
		if err != nil {
			t.Fatal(err)
		}
		if got := RestrictionOf(raw); got != row.needs {
			t.Errorf("RestrictionOf(%s) = %q; want %q", row.flavour, got, row.needs)
		}
		if row.tooLittle.Covers(row.needs) || !row.needs.Covers(row.needs) || !RedistributeAll.Covers(row.needs) {
			t.Errorf("%s: want that %s is too little, and that %s and all are enough", row.flavour, row.tooLittle, row.needs)
		}
	}
}

func TestOtherTermsThanTheFlavourHas(t *testing.T) {
	t.Parallel()
	img, raw, config := sampleImage(t)
	if img == nil {
		t.Fatal("no image")
	}
	for _, row := range []struct {
		name, from, to string
		want           fault.Kind
		restriction    Redistribution
	}{
		{"as written", "", "", fault.Internal, RedistributeUserspace},
		{"no annotation of the level, as in old artifacts", `"dev.prebake.redistribution":"userspace",`, "", fault.Internal,
			RedistributeUserspace},
		{"free for all", `"dev.prebake.redistribution":"userspace"`, `"dev.prebake.redistribution":"none"`, fault.Unverified,
			RedistributeUserspace},
		{"other modules", `"dev.prebake.licence.modules":"GPL-2.0-only OR MIT"`, `"dev.prebake.licence.modules":"MIT"`,
			fault.Unverified, RedistributeUserspace},
		{"unknown flavour", `"dev.prebake.driver.flavour":"open"`, `"dev.prebake.driver.flavour":"free"`, fault.Unverified,
			RedistributeAll},
		{"a field that nobody knows", `{"schemaVersion":2`, `{"newField":{},"schemaVersion":2`, fault.Unverified,
			RedistributeUserspace},
		{"longer than a reader takes", `{"schemaVersion":2`, strings.Repeat(" ", MaxManifest) + `{"schemaVersion":2`,
			fault.Unverified, RedistributeUserspace},
		{"layers that are none", `"layers":[`, `"layers":[7,`, fault.Unverified, RedistributeUserspace},
		{"an annotation that is no text", `"annotations":{"dev`, `"annotations":{"x":7,"dev`, fault.Unverified,
			RedistributeUserspace},
		{"a flavour that is no text", `"dev.prebake.driver.flavour":"open"`, `"dev.prebake.driver.flavour":7`,
			fault.Unverified, RedistributeAll},
		{"a format that is no text", `"dev.prebake.format":"1"`, `"dev.prebake.format":1`, fault.Unverified,
			RedistributeUserspace},
		{"no JSON", `{"schemaVersion":2`, `{"schemaVersion":2 2`, fault.Unverified, RedistributeAll},
		{"not ours, with a field that nobody knows", `"dev.prebake.format":"1",`, `"org.test":"1",`, fault.Unverified,
			RedistributeNone},
		{"not ours", `"dev.prebake.format":"1",`, "", fault.Unverified, RedistributeNone},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			if !bytes.Contains(raw, []byte(row.from)) {
				t.Fatalf("the manifest lacks %s: %s", row.from, raw)
			}
			changed := bytes.Replace(raw, []byte(row.from), []byte(row.to), 1)
			_, err := ParseManifest(changed, config)
			if row.want == fault.Internal && err != nil || row.want != fault.Internal && !fault.Is(err, row.want) {
				t.Errorf("ParseManifest = %v; want kind %s", err, row.want)
			}
			if got := RestrictionOf(changed); got != row.restriction {
				t.Errorf("RestrictionOf = %q; want %q", got, row.restriction)
			}
		})
	}
}

func TestCoversUnknown(t *testing.T) {
	t.Parallel()
	if Redistribution("everything").Covers(RedistributeUserspace) || Redistribution("").Covers(RedistributeUserspace) ||
		RedistributeAll.Covers("more") {
		t.Error("Covers with an unknown word = true; want false")
	}
}
