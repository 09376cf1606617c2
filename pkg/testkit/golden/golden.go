// Package golden compares generated files with what a test generates again.
// Only test files import it. It refuses to change a file that nobody asked it to.
package golden

import (
	"bytes"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Check fails the test where one of the files is not exactly want. With update, which a
// test takes from its flag -update, it writes the files instead.
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
