package target_test

import (
	"testing"

	"github.com/prebake/prebake/pkg/target"
)

// TestMilestone checks the milestone of a BUILD_ID. The rows come from names of published COS images.
func TestMilestone(t *testing.T) {
	t.Parallel()
	rows := []struct {
		buildID string
		want    int
	}{
		{"16108.766.3", 89},      // cos-89-16108-766-3
		{"16623.461.42", 93},     // cos-93-16623-461-42
		{"16919.450.41", 97},     // cos-97-16919-450-41
		{"17162.528.64", 101},    // cos-101-17162-528-64
		{"17412.535.98", 105},    // cos-105-17412-535-98
		{"17800.570.40", 109},    // cos-109-17800-570-40
		{"18244.582.80", 113},    // cos-113-18244-582-80
		{"18613.675.64", 117},    // cos-117-18613-675-64
		{"18867.528.78", 121},    // cos-121-18867-528-78
		{"19216.532.135", 125},   // cos-125-19216-532-135
		{"19506.299.161", 129},   // cos-129-19506-299-161
		{"19999.44.85", 133},     // cos-133-19999-44-85
		{"19879.0.0", 0},         // cos-dev-133-19879-0-0
		{"20162.0.0", 0},         // cos-dev-138-20162-0-0
		{"17800", 0},             // not a BUILD_ID
		{"17800.0.47.1", 0},      // not a BUILD_ID
		{"", 0},                  // an empty text
		{"017800.0.47", 0},       // another spelling of a number
		{"17800.0.47/lakitu", 0}, // the name of a kernel, not a BUILD_ID
	}
	for _, r := range rows {
		got, ok := target.Milestone(r.buildID)
		if got != r.want || ok != (r.want != 0) {
			t.Errorf("Milestone(%q) = %d, %t; want %d", r.buildID, got, ok, r.want)
		}
	}
}
