package target

import (
	"fmt"
	"strings"
)

// ParseLabel reads a label of COS's driver lists in its exact spelling: DEFAULT, LATEST, or a branch such as R535.
func ParseLabel(s string) (Wish, error) {
	switch w := Wish(strings.ToLower(s)); {
	case s == strings.ToUpper(s) && (w == Default || w == Latest):
		return w, nil
	case branchPattern.MatchString(s):
		return Wish(s), nil
	}
	return "", fmt.Errorf("label %.40q: want DEFAULT, LATEST or a branch such as R535", s)
}

// CheckLabel returns an error if a driver version cannot have this label: the text is not a label, or is the label of
// another branch.
func CheckLabel(label, version string) error {
	w, err := ParseLabel(label)
	if err != nil {
		return err
	}
	if branch, is := w.BranchName(); is && branch != Branch(version) {
		return fmt.Errorf("label %s is for another branch: version %.40q belongs to branch %.40s", label, version,
			Branch(version))
	}
	return nil
}
