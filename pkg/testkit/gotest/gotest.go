// Package gotest judges a run of go test that a test or a program started. It starts no run itself.
package gotest

import (
	"errors"
	"fmt"
	"strings"
)

// Check returns an error unless all tests of a run of go test -v ran and passed. Go itself counts a run as passed if
// its tests were skipped, and if no test has the name that -run gives. The arguments are the results of
// [os/exec.Cmd.CombinedOutput].
func Check(out []byte, err error) error {
	text := string(out)
	switch {
	case err != nil:
		return fmt.Errorf("go test: %w", err)
	case strings.Contains(text, "no tests to run"):
		return errors.New("go test: no test of a package has such a name")
	case strings.Contains(text, "--- SKIP"):
		return errors.New("go test: a test was skipped")
	case !strings.Contains(text, "--- PASS"):
		return errors.New("go test: no test passed; want the output of go test -v")
	}
	return nil
}
