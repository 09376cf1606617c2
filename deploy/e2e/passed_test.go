package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
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

// againEnv is the environment variable that makes every test run, even if it passed before. The flag -count does the
// same.
const againEnv = "PREBAKE_AGAIN"

// keepPassed is the time for which a passed test counts. After it, the test runs again, because something that no key
// covers may have changed, such as a program of the host that no build uses.
const keepPassed = 7 * 24 * time.Hour

// reportFile has the report of the last run of all tests. It is beside the records.
const reportFile = "last-run.txt"

// passes remembers tests that passed, by the content of everything that they depend on. Only tests that compile a
// driver without a cache, or boot a machine, ask it: these take most of the time.
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

// testPrograms are the programs of the host that tests run, besides those that run in builds. The digest of those is
// [sandbox.HostTools].
var testPrograms = []string{"apt-get", "bwrap", "containerd", "ctr", "docker-registry", "dpkg-deb", "etcd", "gcc",
	"gcc-12", "git", "ld", "makeself", "mcopy", "mke2fs", "mkfs.vfat", "openssl", "patch", "patchelf",
	"qemu-system-x86_64", "sfdisk", "skopeo", "unshare"}

// newPasses returns the passes of earlier runs. environ is the environment of the tests, as from os.Environ.
func newPasses(ctx context.Context, repo, mirror, dir string, environ, programs []string) (*passes, error) {
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
		Add("environment", strings.Join(settings(environ), "\n")).Add("user", strconv.Itoa(os.Getuid()))
	for _, name := range programs {
		digest, err := digestProgram(ctx, name, filepath.Dir(dir))
		if err != nil {
			return nil, err
		}
		p.host.Add("program "+name, digest)
	}
	return p, nil
}

// settings returns the variables of an environment that can change the result of a test, sorted. Each flag of the
// programs reads a variable PREBAKE_…. Where the state is, and where the test database listens, changes no result.
func settings(environ []string) (all []string) {
	for _, v := range environ {
		name, _, _ := strings.Cut(v, "=")
		switch name {
		case againEnv, "PREBAKE_STATE", "PREBAKE_TEST_POSTGRES":
			continue
		}
		if strings.HasPrefix(name, "PREBAKE_") || strings.HasPrefix(name, "GO") || strings.HasPrefix(name, "CGO_") {
			all = append(all, v)
		}
	}
	slices.Sort(all)
	return all
}

// digestProgram returns the digest of a program in PATH, or "missing". A program below the folder state was unpacked
// there with its own libraries, so the digest covers the folder above the program's folder.
func digestProgram(ctx context.Context, name, state string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "missing", nil
	}
	for _, name := range []*string{&path, &state} {
		if *name, err = filepath.EvalSymlinks(*name); err != nil {
			return "", fmt.Errorf("digest a program that tests run: %w", err)
		}
	}
	if rel, err := filepath.Rel(state, path); err == nil && filepath.IsLocal(rel) {
		path = filepath.Dir(filepath.Dir(path))
	}
	return cas.DigestTree(ctx, path, nil)
}

// whyAll returns why all tests of a run have to run, even if they passed before, or "". look is the present state of
// the files in suiteInputs, and flags are the flags of the test binary.
func whyAll(look inputs.State, flags *flag.FlagSet) (why string) {
	flags.Visit(func(f *flag.Flag) {
		if f.Name == "test.count" {
			why = "the flag -count is given"
		}
	})
	name := olderThanSources(look)
	switch {
	case os.Getenv(againEnv) != "":
		return againEnv + " is set"
	case why == "" && name != "":
		return name + " is older than a source; make build compiles it"
	}
	return why
}

// olderThanSources returns a program in bin that may not be made of the present sources, or "".
func olderThanSources(look inputs.State) string {
	var newest, oldest time.Time
	var program string
	for name, info := range look {
		at := info.ModTime()
		switch {
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

// save stores the tests that passed in this run, and removes old records. Call it only if no file of suiteInputs has
// changed during the run. If the mirror has changed, save stores nothing: a test may have used either content. Some
// tests run the program mirror, which gives all files a new time, so save compares the content.
func (p *passes) save(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if before, ok := p.digests[p.mirror]; ok && p.off == "" {
		now, err := cas.DigestTree(ctx, p.mirror, nil)
		if err != nil {
			return fmt.Errorf("digest the inputs of a test: %w", err)
		}
		if now != before {
			p.passed, p.off = nil, "the mirror got another content during the run"
		}
	}
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

// report says which tests did not run again, and whether results are remembered. If whole is true, the run was one of
// all tests, and report also writes the text to [reportFile]: `go test` hides the output of a package that passed.
func (p *passes) report(whole bool) (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var b strings.Builder
	if p.off != "" {
		fmt.Fprintf(&b, "e2e: no result is remembered, because %s\n", p.off)
	}
	if len(p.kept) == 0 {
		b.WriteString("e2e: no test was left out\n")
	} else {
		slices.Sort(p.kept)
		fmt.Fprintf(&b, "e2e: %d tests were left out, since they passed in the last %d days with the same content "+
			"(%s=1 runs them):\n  %s\n", len(p.kept), keepPassed/(24*time.Hour), againEnv, strings.Join(p.kept, "\n  "))
	}
	if !whole {
		return b.String(), nil
	}
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return b.String(), err
	}
	return b.String(), os.WriteFile(filepath.Join(p.dir, reportFile), []byte(b.String()), 0o644)
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
		"mirror/cos/headers", "emulators/1/bin/qemu", "emulators/1/lib/libc"}
	for _, name := range names {
		write(name, "first")
	}
	qemu := filepath.Join(dir, "emulators/1/bin/qemu")
	if err := os.Chmod(qemu, 0o755); err != nil {
		t.Fatal(err)
	}
	records, environ, meanwhile := filepath.Join(dir, "records"), []string{"HOME=/first"}, func() {}
	// ran returns whether the test runs. All its results pass. The function meanwhile runs in the test.
	ran := func() bool {
		t.Helper()
		p, err := newPasses(t.Context(), repo, mirror, records, environ, []string{qemu, "no such program"})
		if err != nil {
			t.Fatal(err)
		}
		ran := false
		t.Run("it", func(t *testing.T) {
			if ran = !p.rememberedAs(t, "TestIt", []string{"builder"}); ran {
				meanwhile()
			}
		})
		if err := p.save(t.Context()); err != nil {
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
	for v, runs := range map[string]bool{"PREBAKE_LOAD_TEST=off": true, "GODEBUG=x=1": true, "CGO_CFLAGS=-O0": true,
		"HOME=/second": false, "PREBAKE_AGAIN=": false, "PREBAKE_STATE=/x": false, "PREBAKE_TEST_POSTGRES=url": false} {
		environ = []string{v}
		got[v], want[v] = ran(), runs
	}
	// A change of the mirror while the test runs: nobody knows with which content it passed.
	write("mirror/cos/headers", "third")
	meanwhile = func() { write("mirror/cos/headers", "fourth") }
	got["mirror during the run"], want["mirror during the run"] = ran(), true
	write("mirror/cos/headers", "third")
	meanwhile = func() {}
	got["after it"], want["after it"] = ran(), true
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

// TestPassesReport checks the text for the reader: a whole run leaves it beside the records.
func TestPassesReport(t *testing.T) {
	t.Parallel()
	p := &passes{dir: filepath.Join(t.TempDir(), "records"), kept: []string{"TestB", "TestA/of a"}, off: "it rains"}
	want := "e2e: no result is remembered, because it rains\ne2e: 2 tests were left out, since they passed in the last " +
		"7 days with the same content (PREBAKE_AGAIN=1 runs them):\n  TestA/of a\n  TestB\n"
	if got, err := p.report(true); err != nil || got != want {
		t.Errorf("report = %q, %v; want %q", got, err, want)
	}
	if _, err := (&passes{dir: p.dir}).report(false); err != nil { // a run of some tests
		t.Error(err)
	}
	if got, err := os.ReadFile(filepath.Join(p.dir, reportFile)); err != nil || string(got) != want {
		t.Errorf("the file has %q, %v; want %q", got, err, want)
	}
}

// TestWhyAll checks that no result is remembered if -count is given, or for a program that is older than a source.
func TestWhyAll(t *testing.T) {
	t.Setenv(againEnv, "")
	dir := t.TempDir()
	for _, name := range []string{"bin/gpu", "pkg", "deploy/e2e"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(filepath.Join(dir, "deploy/e2e"))
	start := time.Now().Add(-time.Hour)
	// bin may have more files, which no test uses.
	for minute, name := range slices.Concat([]string{"../../bin/gpu/old.test", "../../pkg/old.go"}, programsInBin) {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		at := start.Add(time.Duration(minute) * time.Minute)
		if err := os.Chtimes(name, at, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chtimes("../../pkg", start, start); err != nil {
		t.Fatal(err)
	}
	check := func(want string, args ...string) {
		t.Helper()
		look, err := inputs.Look(append([]string{"../../pkg"}, programsInBin...)...)
		if err != nil {
			t.Fatal(err)
		}
		flags := flag.NewFlagSet("e2e.test", flag.ContinueOnError)
		flags.Uint("test.count", 1, "")
		if err := flags.Parse(args); err != nil {
			t.Fatal(err)
		}
		if got := whyAll(look, flags); got != want {
			t.Errorf("whyAll = %q; want %q", got, want)
		}
	}
	check("")
	check("the flag -count is given", "-test.count=1")
	if err := os.WriteFile("../../pkg/new.go", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	check("../../bin/builder is older than a source; make build compiles it")
	t.Setenv(againEnv, "1")
	check(againEnv + " is set")
}
