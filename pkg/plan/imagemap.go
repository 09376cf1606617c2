package plan

import (
	"encoding/json"
	"fmt"
	"regexp"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// MaxImageMap is the maximum size of an image map in bytes. Google's image map has less than a megabyte.
const MaxImageMap = 32 << 20

const maxImages = 200_000

// imageName matches a COS image's name: the milestone and the three numbers of the BUILD_ID. GKE's own images have
// longer names and do not match.
var imageName = regexp.MustCompile(
	`^cos-(arm64-)?(?:lm-)?(?:beta-|dev-|stable-)?([0-9]{2,4})-([0-9]{1,9})-([0-9]{1,9})-([0-9]{1,9})$`)

// ImageMap has the COS builds that became images. The zero value has none.
type ImageMap struct {
	milestones map[string]int
	released   map[string]bool // BUILD_ID/board
	kernels    []target.Kernel
	gke        map[string][]string // GKE versions by BUILD_ID/board
}

// ParseImageMap reads a list of images in the format of Google's gke-to-cos.json. It skips images that are not COS
// images. A list without any COS image is an error of kind fault.Unsupported.
func ParseImageMap(data []byte) (*ImageMap, error) {
	const hint = "set imageMap of the wish list, or --gke-map of the server, to the URL of a list in the format of " +
		"https://www.gstatic.com/gke-image-maps/gke-to-cos.json"
	if len(data) > MaxImageMap {
		return nil, fault.New(fault.Unsupported, fmt.Sprintf("read image map: the list has more than %d bytes", MaxImageMap),
			hint)
	}
	var list struct {
		Entries []struct {
			GKE   string `json:"gke_version"`
			Image string `json:"image"`
		} `json:"entries"`
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, fault.Wrap(fault.Unsupported, fmt.Errorf("read image map: %w", err), hint)
	}
	if len(list.Entries) > maxImages {
		return nil, fault.New(fault.Unsupported,
			fmt.Sprintf("read image map: the list has %d entries; want at most %d entries", len(list.Entries), maxImages), hint)
	}
	m := &ImageMap{milestones: map[string]int{}, released: map[string]bool{}, gke: map[string][]string{}}
	for _, e := range list.Entries {
		parts := imageName.FindStringSubmatch(e.Image)
		if parts == nil {
			continue
		}
		board := "lakitu"
		if parts[1] != "" {
			board = "lakitu-arm64"
		}
		k, err := target.ParseKernel(parts[3]+"."+parts[4]+"."+parts[5], board)
		if err != nil {
			continue
		}
		if _, err := fmt.Sscanf(parts[2], "%d", &k.Milestone); err != nil {
			continue
		}
		m.milestones[k.BuildID] = k.Milestone
		if !m.released[k.String()] {
			m.released[k.String()] = true
			m.kernels = append(m.kernels, k)
		}
		if version, err := ParseGKE(e.GKE); err == nil {
			m.gke[k.String()] = append(m.gke[k.String()], version)
		}
	}
	if len(m.kernels) == 0 {
		return nil, fault.New(fault.Unsupported, "read image map: the list has no COS image", hint)
	}
	return m, nil
}

// milestone returns the milestone of a COS build, from the image map or else from the BUILD_ID's first number; 0 means
// unknown.
func (m *ImageMap) milestone(buildID string) int {
	if m != nil && m.milestones[buildID] != 0 {
		return m.milestones[buildID]
	}
	n, _ := target.Milestone(buildID)
	return n
}
