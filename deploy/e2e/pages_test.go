package e2e

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/deploy/internal/page"
)

// TestPages runs the code blocks that pages mark with "run". Each command must print the output that the page shows.
func TestPages(t *testing.T) {
	t.Parallel()
	defer shared.turns.take(15)()
	names, err := filepath.Glob("../../docs/*/*.md")
	if err != nil {
		t.Fatal(err)
	}
	played := 0
	for _, name := range append(names, "../../README.md") {
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		commands := page.Parse(source).Script()
		if len(commands) == 0 {
			continue
		}
		played++
		t.Run(strings.TrimPrefix(name, "../../"), func(t *testing.T) {
			dir := t.TempDir()
			symlink(t, shared.Bin, filepath.Join(dir, "bin"))
			// The tests' own caches are the reader's caches, as if the reader had run the demo before.
			symlink(t, shared.State, filepath.Join(dir, "home/.cache/prebake"))
			env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "PREBAKE_") })
			env = append(env, "HOME="+filepath.Join(dir, "home"), "XDG_CACHE_HOME="+filepath.Join(dir, "home/.cache"),
				"PATH="+shared.Bin+":"+os.Getenv("PATH"),
				"PREBAKE_LISTEN=127.0.0.1:0") // another server may use the default port
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
			defer cancel()
			if err := page.Play(ctx, dir, env, commands); err != nil {
				t.Errorf("%s, %v", name, err)
			}
		})
	}
	if played == 0 {
		t.Error("no page has a block to run")
	}
}

func symlink(t *testing.T, to, name string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(to, name); err != nil {
		t.Fatal(err)
	}
}
