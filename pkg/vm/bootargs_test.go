package vm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
)

func TestBootArgs(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name, text string
		want       []string
		refused    bool
	}{
		{name: "COS", text: "loadpin.exclude=kernel-module,firmware  module.sig_enforce=1\n",
			want: []string{"loadpin.exclude=kernel-module,firmware", "module.sig_enforce=1"}},
		{name: "empty", text: "\n"},
		{name: "control character", text: "quiet\x00init=/x", refused: true},
		{name: "arguments of init", text: "quiet -- x", refused: true},
		{name: "not ASCII", text: "größe=1", refused: true},
		{name: "too long", text: strings.Repeat("a ", maxBootArgs), refused: true},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, BootArgs), []byte(row.text), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := bootArgs(dir)
			if fault.Is(err, fault.Usage) != row.refused || !row.refused && err != nil {
				t.Fatalf("bootArgs(%q) = %v; want refused %v", row.text, err, row.refused)
			}
			if diff := cmp.Diff(row.want, got); diff != "" {
				t.Errorf("bootArgs(%q) differs (-want +got):\n%s", row.text, diff)
			}
		})
	}
	if got, err := bootArgs(t.TempDir()); got != nil || err != nil {
		t.Errorf("bootArgs of a folder without the file = %v, %v; want none", got, err)
	}
}

func FuzzBootArgs(f *testing.F) {
	f.Add([]byte("loadpin.exclude=kernel-module\n"))
	f.Add([]byte("a\x00b -- c"))
	f.Fuzz(func(t *testing.T, text []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, BootArgs), text, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := bootArgs(dir)
		if err != nil {
			return
		}
		line := strings.Join(got, " ")
		if len(line) > maxBootArgs || strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r >= 0x7f }) {
			t.Errorf("bootArgs(%q) = %q, which no kernel takes", text, got)
		}
	})
}
