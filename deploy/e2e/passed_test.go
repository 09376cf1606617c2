package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/testkit/inputs"
)

// againEnv is the environment variable that makes every test run, even if it passed before.
const againEnv = "PREBAKE_AGAIN"

// keepPassed is the time for which a passed test counts. After it, the test runs again, because something that no key
// covers may have changed, such as a program of the host that no build uses.
const keepPassed = 7 * 24 * time.Hour

// passes remembers which tests passed, with a key of the content of everything that they depend on. Only tests that
// compile a driver without a cache, or boot a machine, use it, because these tests take most of the time.
//
// Go's cache of test results is not enough. It compares the modification times of files, so a new clone starts without
// results. And it keeps one result for the whole package, so a change of any file makes all tests run again.
type passes struct {
	// repo is this repository, mirror the folder with the mirror's buckets, and dir the folder of the records.
	repo, mirror, dir string
	// host begins each key. It has what all tests depend on besides files: the host's tools, kernel, user, and Go version
	// and flags.
	host *cas.Key
	// off says why no result is remembered. "" means that results are remembered.
	off string

	mu      sync.Mutex
	digests map[string]string // of files and folders that were read
	passed  []string          // keys of tests that passed in this run
	kept    []string          // names of tests that did not run again
}

// always are the folders and files that all tests depend on, besides the mirror. docs is one of them, because some
// tests compare tables in docs with the code.
var always = []string{"pkg", "docs", "deploy/e2e", "deploy/internal", "deploy/mirror", "go.mod", "go.sum"}

// newPasses returns the passes of earlier runs. look is the present state of the files in suiteInputs.
func newPasses(repo, mirror, dir string, look inputs.State) (*passes, error) {
	tools, err := sandbox.HostTools()
	if err != nil {
		return nil, err
	}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return nil, err
	}
	p := &passes{repo: repo, mirror: mirror, dir: dir, digests: map[string]string{}}
	p.host = cas.NewKey("a passed test").Add("tools", tools).Add("kernel", string(kernel)).Add("go", runtime.Version()).
		Add("flags", os.Getenv("GOFLAGS")).Add("user", strconv.Itoa(os.Getuid()))
	if os.Getenv(againEnv) != "" {
		p.off = againEnv + " is set"
	} else if name := olderThanSources(look); name != "" {
		p.off = name + " is older than a source; make build compiles it"
	}
	return p, nil
}

// olderThanSources returns a program in bin that is older than the newest source, or "" if there is none. Such a
// program may lack the last change of the sources.
func olderThanSources(look inputs.State) string {
	var newest, oldest time.Time
	var program string
	for name, info := range look {
		at := info.ModTime()
		switch {
		case name == "../../bin":
		case !strings.HasPrefix(name, "../../bin/"):
			if at.After(newest) {
				newest = at
			}
		case program == "" || at.Before(oldest):
			program, oldest = name, at
		}
	}
	if newest.After(oldest) {
		return program
	}
	return ""
}

// remembered returns true if this test has passed within [keepPassed], with the same content of the given folders of
// this repository and of what all tests depend on. The caller then returns at once.
func (p *passes) remembered(t *testing.T, folders ...string) bool {
	t.Helper()
	return p.rememberedAs(t, t.Name(), folders)
}

// rememberedAs works as the method remembered, for a test with the given name.
func (p *passes) rememberedAs(t *testing.T, name string, folders []string) bool {
	t.Helper()
	if p.off != "" {
		return false
	}
	key, err := p.key(t.Context(), name, folders)
	if err != nil {
		t.Fatal(err)
	}
	if at, ok := p.find(key); ok {
		t.Logf("passed at %s with the same content; %s=1 runs it again", at.Format(time.RFC3339), againEnv)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.kept = append(p.kept, name)
		return true
	}
	t.Cleanup(func() {
		if !t.Failed() && !t.Skipped() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.passed = append(p.passed, key)
		}
	})
	return false
}

// key returns the key of a test's inputs.
func (p *passes) key(ctx context.Context, test string, folders []string) (string, error) {
	mirror, err := p.digest(ctx, p.mirror)
	if err != nil {
		return "", err
	}
	key := p.host.With("test", test).Add("mirror", mirror)
	for _, name := range slices.Concat(always, folders) {
		digest, err := p.digest(ctx, filepath.Join(p.repo, name))
		if err != nil {
			return "", err
		}
		key.Add(name, digest)
	}
	return key.String(), nil
}

// digest returns the digest that a file or folder had when a test first asked for it.
func (p *passes) digest(ctx context.Context, path string) (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if digest, ok := p.digests[path]; ok {
		return digest, nil
	}
	digest, err := cas.DigestTree(ctx, path, nil)
	if err != nil {
		return "", fmt.Errorf("digest the inputs of a test: %w", err)
	}
	p.digests[path] = digest
	return digest, nil
}

// find returns the time at which a test with this key passed, or false if none passed within [keepPassed].
func (p *passes) find(key string) (time.Time, bool) {
	info, err := os.Stat(filepath.Join(p.dir, key))
	if err != nil || time.Since(info.ModTime()) > keepPassed {
		return time.Time{}, false
	}
	return info.ModTime(), true
}

// save stores the tests that passed in this run, and removes old records. Call it only if no input has changed during
// the run.
func (p *passes) save() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return err
	}
	for _, key := range p.passed {
		if err := os.WriteFile(filepath.Join(p.dir, key), nil, 0o600); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, ok := p.find(e.Name()); ok {
			continue
		}
		if err := os.Remove(filepath.Join(p.dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// TestPasses checks which changes make a test run again.
func TestPasses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	repo, mirror := filepath.Join(dir, "repo"), filepath.Join(dir, "mirror")
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	names := []string{"repo/pkg/a/a.go", "repo/docs/d.md", "repo/deploy/e2e/e_test.go", "repo/deploy/internal/i.go",
		"repo/deploy/mirror/m.go", "repo/go.mod", "repo/go.sum", "repo/builder/b.go", "repo/fetcher/f.go",
		"mirror/cos/headers"}
	for _, name := range names {
		write(name, "first")
	}
	records := filepath.Join(dir, "records")
	// ran reports whether the test runs. When it runs, it passes.
	ran := func() bool {
		t.Helper()
		p, err := newPasses(repo, mirror, records, inputs.State{})
		if err != nil {
			t.Fatal(err)
		}
		p.off = "" // independent of the environment
		ran := false
		t.Run("it", func(t *testing.T) { ran = !p.rememberedAs(t, "TestIt", []string{"builder"}) })
		if err := p.save(); err != nil {
			t.Fatal(err)
		}
		return ran
	}
	got := map[string]bool{"first": ran(), "unchanged": ran()}
	want := map[string]bool{"first": true, "unchanged": false}
	for _, name := range names {
		write(name, "second")
		got[name], want[name] = ran(), name != "repo/fetcher/f.go"
	}
	entries, err := os.ReadDir(records)
	if err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-keepPassed - time.Minute)
	for _, e := range entries {
		if err := os.Chtimes(filepath.Join(records, e.Name()), old, old); err != nil {
			t.Fatal(err)
		}
	}
	got["after a week"], want["after a week"] = ran(), true
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("after which change the test runs (-want +got):\n%s", diff)
	}
	if entries, err := os.ReadDir(records); err != nil || len(entries) != 1 {
		t.Errorf("%d records after a week, %v; want only the newest", len(entries), err)
	}
}

// TestOlderThanSources checks that olderThanSources finds a program that is older than a source.
func TestOlderThanSources(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"bin", "pkg", "deploy/e2e"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(filepath.Join(dir, "deploy/e2e"))
	start := time.Now().Add(-time.Hour)
	for minute, name := range []string{"../../pkg/old.go", "../../bin/builder", "../../bin/server"} {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		at := start.Add(time.Duration(minute) * time.Minute)
		if err := os.Chtimes(name, at, at); err != nil {
			t.Fatal(err)
		}
	}
	check := func(want string) {
		t.Helper()
		look, err := inputs.Look("../../bin", "../../pkg")
		if err != nil {
			t.Fatal(err)
		}
		if got := olderThanSources(look); got != want {
			t.Errorf("olderThanSources = %q; want %q", got, want)
		}
	}
	if err := os.Chtimes("../../pkg", start, start); err != nil {
		t.Fatal(err)
	}
	check("")
	if err := os.WriteFile("../../pkg/new.go", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	check("../../bin/builder")
}
