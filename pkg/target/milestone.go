package target

import "strings"

// Milestone returns the COS milestone of a BUILD_ID: VERSION in the image's /etc/os-release. Milestone returns false
// for development branches, for milestones newer than this table, and for a text that is not a BUILD_ID.
//
// A BUILD_ID begins with the number of the branch on which the milestone was made. Google publishes no list of these
// numbers, but the name of an image has both numbers (cos-109-17800-570-40). The table comes from the release notes of
// each milestone. For milestones out of support it comes from endoflife.date's list of last releases.
//
// The table leaves out development images, because one milestone has several branch numbers during its development:
// milestone 133 had 19672, 19700 and 19879 before 19999. Do not guess the milestone of a branch number between two
// entries of the table: an image of a milestone that is not in the table would get the number of another one.
func Milestone(buildID string) (int, bool) {
	if !buildIDPattern.MatchString(buildID) {
		return 0, false
	}
	branch, _, _ := strings.Cut(buildID, ".")
	switch branch {
	case "16108":
		return 89, true
	case "16623":
		return 93, true
	case "16919":
		return 97, true
	case "17162":
		return 101, true
	case "17412":
		return 105, true
	case "17800":
		return 109, true
	case "18244":
		return 113, true
	case "18613":
		return 117, true
	case "18867":
		return 121, true
	case "19216":
		return 125, true
	case "19506":
		return 129, true
	case "19999":
		return 133, true
	}
	return 0, false
}
