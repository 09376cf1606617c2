package target

import "strings"

// Milestone returns the COS milestone, VERSION of /etc/os-release, that a
// BUILD_ID belongs to, and false where it is not known: builds of a development
// branch, milestones newer than this table, and what is no BUILD_ID.
//
// A milestone's builds carry the number of the branch that it was cut from, in
// all releases that were ever made of it, and Google publishes no list of
// these numbers. The names of images tell them (cos-109-17800-570-40), and so
// this table is read from the release notes of each milestone and, for those
// that are out of support, from endoflife.date's list of last releases.
// Development images of one milestone have many branch numbers (133 had 19672,
// 19700 and 19879 before 19999), and guessing by interval would call an unknown
// milestone by a known one's name; they are left out.
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
