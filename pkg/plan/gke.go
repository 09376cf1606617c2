package plan

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/target"
)

// MaxGKE is the largest number of GKE versions of one kernel. If there are more, the newest are kept.
const MaxGKE = 200

// gkeVersion matches a GKE version, such as 1.33.5-gke.1080000.
var gkeVersion = regexp.MustCompile(`^[0-9]{1,3}\.[0-9]{1,4}\.[0-9]{1,4}-gke\.[0-9]{1,9}$`)

// ParseGKE reads a GKE version. It accepts a leading v, because kubelets print versions with it.
func ParseGKE(s string) (string, error) {
	if version := strings.TrimPrefix(s, "v"); gkeVersion.MatchString(version) {
		return version, nil
	}
	return "", fmt.Errorf("GKE version %.40q: want a version such as 1.33.5-gke.1080000", s)
}

// CompareGKE compares two GKE versions by their numbers.
func CompareGKE(a, b string) int {
	return target.CompareVersions(strings.Replace(a, "-gke.", ".", 1), strings.Replace(b, "-gke.", ".", 1))
}

// GKE returns the image map's kernels that GKE's nodes boot, newest BUILD_ID first. It also returns each kernel's GKE
// versions, newest first, by the key BUILD_ID/board.
func (m *ImageMap) GKE() (kernels []target.Kernel, versions map[string][]string) {
	if m == nil {
		return nil, nil
	}
	versions = maps.Clone(m.gke)
	for k, all := range versions {
		all = slices.Clone(all)
		slices.SortFunc(all, func(a, b string) int { return CompareGKE(b, a) })
		all = slices.Compact(all)
		versions[k] = slices.Clip(all[:min(len(all), MaxGKE)])
	}
	for _, k := range m.kernels {
		if len(versions[k.String()]) > 0 {
			kernels = append(kernels, k)
		}
	}
	slices.SortStableFunc(kernels, func(a, b target.Kernel) int { return target.CompareVersions(b.BuildID, a.BuildID) })
	return kernels, versions
}
