// Package golden compares files in the repository with the output that a test made. It changes a file only if the test
// asks for it. Only test files import the package.
package golden

import (
	"bytes"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Check fails the test if one of the files differs from want. If update is true, Check writes the files instead.
func Check(t testing.TB, update bool, want []byte, files ...string) {
	t.Helper()
	for _, file := range files {
		if update {
			if err := os.WriteFile(file, want, 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is out of date; run go test -run '^%s$' -update in this package "+
				"(- file, + what the test generates)\n%s", file, t.Name(), cmp.Diff(string(got), string(want)))
		}
	}
}
