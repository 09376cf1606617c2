package main

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

// TestRefusals checks that wrong settings are refused, with a hint, before anything is fetched.
func TestRefusals(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	none := filepath.Join(dir, "none")
	for name, row := range map[string]struct {
		args []string
		want string
	}{
		"an argument": {[]string{"--out", dir, "x"}, "unexpected argument"},
		"no builder":  {[]string{"--out", dir, "--builder", none}, "compile the emulated GPU"},
		"an unknown board": {[]string{"--out", dir, "--builder", none, "--no-boot-archive", "--board", "lakitu-arm64"},
			"want a board for amd64"},
		"an odd series": {[]string{"--out", dir, "--no-boot-archive", "--kernel-series", "5.4"}, "want 6.1 or 6.12"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := root()
			var out bytes.Buffer
			cmd.Writer, cmd.ErrWriter = &out, &out
			err := cmd.Run(t.Context(), append([]string{"mirror", "--cache", filepath.Join(t.TempDir(), "cache")}, row.args...))
			if fault.Of(err) != fault.Usage || !strings.Contains(err.Error(), row.want) {
				t.Errorf("mirror %v = %v; want %q", row.args, err, row.want)
			}
		})
	}
}
