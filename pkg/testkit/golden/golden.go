// Package golden compares generated files with the output of the test that generates them again. Only test files import
// it. It changes a file only on request.
package golden

import (
	"bytes"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Check fails the test if one of the files differs from want. With update it writes the files instead; a test sets it
// from its flag -update.
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
			t.Errorf("%s is not what its source gives; run go test -run '^%s$' -update in this package (- file, + source)\n%s",
				file, t.Name(), cmp.Diff(string(got), string(want)))
		}
	}
}
