package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/deploy/internal/page"
)

// The pages for newcomers are scripts: what they tell a reader to type works as it
// stands, and prints what they show.
func TestPages(t *testing.T) {
	for _, name := range []string{"docs/tutorials/try-it-offline.md"} {
		t.Run(name, func(t *testing.T) {
			source, err := os.ReadFile(filepath.Join("../..", name))
			if err != nil {
				t.Fatal(err)
			}
			commands := page.Parse(source).Script()
			if len(commands) == 0 {
				t.Fatalf("%s has no block to run", name)
			}
			dir := t.TempDir()
			symlink(t, shared.Bin, filepath.Join(dir, "bin"))
			// The caches of a reader who played the demo before.
			symlink(t, shared.State, filepath.Join(dir, "home/.cache/prebake"))
			env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "PREBAKE_") })
			env = append(env, "HOME="+filepath.Join(dir, "home"), "XDG_CACHE_HOME="+filepath.Join(dir, "home/.cache"),
				"PREBAKE_LISTEN=127.0.0.1:0") // another server may have the usual port
			if err := page.Play(t.Context(), dir, env, commands); err != nil {
				t.Errorf("%s, %v", name, err)
			}
		})
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
