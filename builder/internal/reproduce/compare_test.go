package reproduce

import (
	"bytes"
	"debug/elf"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCompareTrees(t *testing.T) {
	t.Parallel()
	program, err := os.ReadFile("/proc/self/exe") // any ELF file will do, such as this test program
	if err != nil {
		t.Fatal(err)
	}
	changed := append([]byte(nil), program...)
	changed[findSection(t, program, ".text")] ^= 1

	a, b := t.TempDir(), t.TempDir()
	for dir, files := range map[string]map[string]string{
		a: {"same": "1", "short": "12", "text": "abcdef", "gone": "x", "prog": "p", "elf": string(program)},
		b: {"same": "1", "short": "1", "text": "abcDef", "new": "y", "prog": "p", "elf": string(changed)},
	} {
		for name, content := range files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Chmod(filepath.Join(b, "prog"), 0o755); err != nil {
		t.Fatal(err)
	}
	for dir, target := range map[string]string{a: "same", b: "short"} {
		if err := os.Symlink(target, filepath.Join(dir, "link")); err != nil {
			t.Fatal(err)
		}
	}
	files, got, err := compareTrees(a, b, false)
	if err != nil || files != 8 {
		t.Errorf("compareTrees = %d files, %v; want 8", files, err)
	}
	want := []Difference{
		{"elf", "differs in section .text"},
		{"gone", "only in the published artifact"},
		{"link", "link to same in the published artifact, link to short in the rebuild"},
		{"new", "missing in the published artifact"},
		{"prog", "file in the published artifact, program in the rebuild"},
		{"short", "2 bytes in the published artifact, 1 in the rebuild"},
		{"text", "differs from byte 3 on"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("differences (-want +got):\n%s", diff)
	}
}

// findSection returns the offset of a section's first byte.
func findSection(t *testing.T, file []byte, name string) uint64 {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	s := f.Section(name)
	if s == nil {
		t.Fatalf("no section %s", name)
	}
	return s.Offset
}
