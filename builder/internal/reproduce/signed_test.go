package reproduce

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/modinfo"
)

// TestCompareSigned checks that the comparison ignores the modules' signatures only if the provenance says that the
// modules are signed.
func TestCompareSigned(t *testing.T) {
	t.Parallel()
	a, b := t.TempDir(), t.TempDir()
	signature := "any signature"
	trailer := append([]byte{0, 0, 2, 0, 0, 0, 0, 0}, binary.BigEndian.AppendUint32(nil, uint32(len(signature)))...)
	tail := signature + string(trailer) + modinfo.SignatureMagic
	for dir, files := range map[string]map[string]string{
		a: {"same.ko": "module" + tail, "other.ko": "mOdule" + tail, "text": "module" + tail},
		b: {"same.ko": "module", "other.ko": "module", "text": "module"},
	} {
		for name, content := range files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	for signed, want := range map[bool][]string{true: {"other.ko", "text"}, false: {"other.ko", "same.ko", "text"}} {
		_, all, err := compareTrees(a, b, signed)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, d := range all {
			got = append(got, d.Name)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("signed %v: differences (-want +got):\n%s", signed, diff)
		}
	}
}
