package target

import (
	"fmt"
	"strings"
)

// ParseLabel reads a label of COS's driver lists, as it is spelled there:
// DEFAULT, LATEST or a branch such as R535. It returns the wish that the label
// answers.
func ParseLabel(s string) (Wish, error) {
	switch w := Wish(strings.ToLower(s)); {
	case s == strings.ToUpper(s) && (w == Default || w == Latest):
		return w, nil
	case branchPattern.MatchString(s):
		return Wish(s), nil
	}
	return "", fmt.Errorf("label %.40q: want DEFAULT, LATEST or a branch such as R535", s)
}

// CheckLabel refuses a label that a version cannot have: no label, or that of
// another branch.
func CheckLabel(label, version string) error {
	w, err := ParseLabel(label)
	if err != nil {
		return err
	}
	if branch, is := w.BranchName(); is && branch != Branch(version) {
		return fmt.Errorf("label %s: %.40q is of branch %.40s", label, version, Branch(version))
	}
	return nil
}
