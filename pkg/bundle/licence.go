package bundle

import (
	"encoding/json"
	"fmt"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/target"
)

// Annotations of the manifest about the licences of the artifact's parts. Their values depend only on the flavour.
// Older artifacts do not have them.
const (
	AnnotationModulesLicence   = "dev.prebake.licence.modules"
	AnnotationUserspaceLicence = "dev.prebake.licence.userspace"
	// AnnotationRedistribution has a [Redistribution]: the least level that an operator must allow before the artifact is
	// published where everybody can read it.
	AnnotationRedistribution = "dev.prebake.redistribution"
	// annotationLicenses is for tools of other projects (OCI image-spec, annotations.md).
	annotationLicenses = "org.opencontainers.image.licenses"
)

// Licences as SPDX expressions. SPDX's list does not have NVIDIA's licence: its text is share/LICENSE in the layer of
// user space.
const (
	// LicenceOpen is the meaning of "Dual MIT/GPL" in the open modules (Linux,
	// Documentation/process/license-rules.rst).
	LicenceOpen   = "GPL-2.0-only OR MIT"
	LicenceNVIDIA = "LicenseRef-NVIDIA-driver"
)

// Redistribution says which parts under NVIDIA's licence may be published where everybody can read them.
type Redistribution string

// Levels of redistribution, from the least to the most. Each level includes the levels before it.
const (
	// RedistributeNone allows no part under NVIDIA's licence.
	RedistributeNone Redistribution = "none"
	// RedistributeUserspace allows user space and firmware, which are unchanged files of NVIDIA. It is enough for
	// artifacts with open modules.
	RedistributeUserspace Redistribution = "userspace"
	// RedistributeAll also allows proprietary modules.
	RedistributeAll Redistribution = "all"
)

func redistributions() []Redistribution {
	return []Redistribution{RedistributeNone, RedistributeUserspace, RedistributeAll}
}

// Covers reports whether this allowed level includes the required level. It returns false if one of them is unknown.
func (r Redistribution) Covers(required Redistribution) bool {
	return slices.Contains(redistributions(), required) &&
		slices.Index(redistributions(), r) >= slices.Index(redistributions(), required)
}

// Licence has the licences of the parts of an artifact.
type Licence struct {
	// Modules and Userspace are SPDX expressions. Firmware has the same licence as user space.
	Modules, Userspace string
	// Redistribution is the level that an operator must allow before everybody may read the artifact.
	Redistribution Redistribution
}

// LicenceOf returns the licences of an artifact with modules of this flavour.
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

// checkLicence returns an error if an annotation names another licence than that of flavour f. Annotations may be
// missing, because older artifacts have none.
func checkLicence(m *v1.Manifest, f target.Flavour) error {
	for key, want := range LicenceOf(f).annotations() {
		if have, ok := m.Annotations[key]; ok && have != want {
			return fmt.Errorf("annotation %s is %.80q; want %[4]q, because the modules are of flavour %[3]s", key, have, f, want)
		}
	}
	return nil
}

// RestrictionOf returns the level that an operator must allow before everybody may read the content of this manifest.
// If the manifest has [AnnotationFormat], the flavour in its annotations decides. Such a manifest is an artifact, or is
// attached to an artifact and repeats its annotations. For every other manifest, the result is RedistributeNone.
// Nothing else in the manifest can lower the level. If the manifest or the flavour cannot be parsed, the result is
// RedistributeAll.
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
