package bundle

import (
	"encoding/json"
	"fmt"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/target"
)

// Annotations of the manifest that say whose terms its parts are under. They follow
// from the flavour, so that equal inputs still give equal digests, whatever an operator
// allows. Artifacts that were published before there were any have none.
const (
	AnnotationModulesLicence   = "dev.prebake.licence.modules"
	AnnotationUserspaceLicence = "dev.prebake.licence.userspace"
	// AnnotationRedistribution holds a [Redistribution]: the least that an operator has to allow
	// before the artifact goes where everybody can read it.
	AnnotationRedistribution = "dev.prebake.redistribution"
	// annotationLicenses is for tools of others (OCI image-spec, annotations.md).
	annotationLicenses = "org.opencontainers.image.licenses"
)

// Licences as SPDX expressions. NVIDIA's text is no licence of SPDX's list; it is
// share/LICENSE in the layer of user space.
const (
	// LicenceOpen is what "Dual MIT/GPL" of the open modules means (Linux,
	// Documentation/process/license-rules.rst).
	LicenceOpen   = "GPL-2.0-only OR MIT"
	LicenceNVIDIA = "LicenseRef-NVIDIA-driver"
)

// Redistribution is how much of what is under NVIDIA's licence goes to destinations
// that everybody can read.
type Redistribution string

// From nothing to all. What allows more covers what needs less.
const (
	// RedistributeNone keeps everything under NVIDIA's licence among ourselves.
	RedistributeNone Redistribution = "none"
	// RedistributeUserspace lets user space and firmware go, which are as NVIDIA made
	// them, and so artifacts of open modules.
	RedistributeUserspace Redistribution = "userspace"
	// RedistributeAll lets proprietary modules go too.
	RedistributeAll Redistribution = "all"
)

func redistributions() []Redistribution {
	return []Redistribution{RedistributeNone, RedistributeUserspace, RedistributeAll}
}

// ParseRedistribution reads one of the three words.
func ParseRedistribution(text string) (Redistribution, error) {
	if r := Redistribution(text); slices.Contains(redistributions(), r) {
		return r, nil
	}
	return "", fmt.Errorf("redistribution %.40q: want none, userspace or all", text)
}

// Covers reports whether what is allowed is enough for what is needed. An unknown word
// allows nothing, and needs more than anybody allows.
func (r Redistribution) Covers(need Redistribution) bool {
	return slices.Contains(redistributions(), need) &&
		slices.Index(redistributions(), r) >= slices.Index(redistributions(), need)
}

// Licence says whose terms the parts of an artifact are under.
type Licence struct {
	// Modules and Userspace are SPDX expressions; firmware is under the terms of user space.
	Modules, Userspace string
	// Redistribution is what an operator has to allow before everybody gets it.
	Redistribution Redistribution
}

// LicenceOf returns the licence of artifacts with modules of this flavour.
func LicenceOf(f target.Flavour) Licence {
	if f == target.Open {
		return Licence{LicenceOpen, LicenceNVIDIA, RedistributeUserspace}
	}
	return Licence{LicenceNVIDIA, LicenceNVIDIA, RedistributeAll}
}

// annotations returns the licence as annotations of a manifest.
func (l Licence) annotations() map[string]string {
	all := l.Userspace
	if l.Modules != l.Userspace {
		all = "(" + l.Modules + ") AND " + l.Userspace
	}
	return map[string]string{
		AnnotationModulesLicence:   l.Modules,
		AnnotationUserspaceLicence: l.Userspace,
		AnnotationRedistribution:   string(l.Redistribution),
		annotationLicenses:         all,
	}
}

// checkLicence refuses a manifest that states other terms than its flavour has.
func checkLicence(m *v1.Manifest, f target.Flavour) error {
	for key, want := range LicenceOf(f).annotations() {
		if have, ok := m.Annotations[key]; ok && have != want {
			return fmt.Errorf("annotation %s is %.80q; artifacts of %s modules have %q", key, have, f, want)
		}
	}
	return nil
}

// RestrictionOf returns what an operator has to allow before everybody gets what this
// manifest names: an artifact of ours, or what is attached to one with its annotations,
// such as debug symbols. Other manifests need nothing. Nothing but the annotations counts:
// what else is in it, or how long it is, makes no artifact free. Of one whose annotations
// cannot be read nobody knows what it is, and it needs the most.
func RestrictionOf(manifest []byte) Redistribution {
	var m struct {
		Annotations map[string]any `json:"annotations"`
	}
	if json.Unmarshal(manifest, &m) != nil {
		return RedistributeAll
	}
	if format, ok := m.Annotations[AnnotationFormat]; !ok || format == "" {
		return RedistributeNone
	}
	flavour, _ := m.Annotations[AnnotationDriverFlavour].(string)
	if f, err := target.ParseFlavour(flavour); err == nil {
		return LicenceOf(f).Redistribution
	}
	return RedistributeAll
}
