package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// TestKeysAreReadAgain changes the file with the trusted keys between the runs of one process. Each run must use the
// keys that the file has then. If the file is damaged or missing, it must use the last good ones.
func TestKeysAreReadAgain(t *testing.T) {
	t.Parallel()
	key, other := testkit.NewKey(t), testkit.NewKey(t)
	c := sample.NewCell(t, "17800.0.47", "535.261.03")
	dir := t.TempDir()
	file, layout := filepath.Join(dir, "keys.pem"), "oci:"+filepath.Join(dir, "layout")
	sample.Publish(t, layout, key, c)
	write := func(text []byte) {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(key.PEM(t))
	cmd := runCommand()
	cmd.Writer, cmd.ErrWriter = io.Discard, io.Discard
	cmd.Action = func(ctx context.Context, cmd *ucli.Command) error {
		a, done, err := newAgent(cmd, false)
		if err != nil {
			return err
		}
		run := func(name string, unverified bool) {
			t.Helper()
			if _, err := a.Run(ctx); (err != nil) != unverified || unverified && !fault.Is(err, fault.Unverified) {
				t.Errorf("%s: Run = %v; want unverified: %v", name, err, unverified)
			}
		}
		run("the publisher's key", false)
		write([]byte("damaged"))
		run("a damaged file", false)
		write(other.PEM(t))
		run("another key", true)
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		run("no file after another key", true)
		write(key.PEM(t))
		run("the publisher's key again", false)
		return done()
	}
	if err := cmd.Run(t.Context(), []string{"run", "--host-root", sample.Root(t, c, 1), "--registry", layout,
		"--public-key", file, "--driver", "535.261.03", "--no-load", "--builder", "never"}); err != nil {
		t.Error(err)
	}
}
