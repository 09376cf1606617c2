package plan

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/target"
)

// MaxGKE is how many GKE versions are kept of one kernel, the newest.
const MaxGKE = 200

// gkeVersion is the form of a version of GKE, such as 1.33.5-gke.1080000.
var gkeVersion = regexp.MustCompile(`^[0-9]{1,3}\.[0-9]{1,4}\.[0-9]{1,4}-gke\.[0-9]{1,9}$`)

// ParseGKE reads a version of GKE, as the node says it too: with a v before it.
func ParseGKE(s string) (string, error) {
	if version := strings.TrimPrefix(s, "v"); gkeVersion.MatchString(version) {
		return version, nil
	}
	return "", fmt.Errorf("GKE version %.40q: want one such as 1.33.5-gke.1080000", s)
}

// CompareGKE compares two versions of GKE by their numbers.
func CompareGKE(a, b string) int {
	return target.CompareVersions(strings.Replace(a, "-gke.", ".", 1), strings.Replace(b, "-gke.", ".", 1))
}

// GKE returns the kernels that nodes of GKE boot, newest BUILD_ID first, by what the
// list says, and the GKE versions of each by BUILD_ID/board, newest first. The board is
// the one that the image's name tells.
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
