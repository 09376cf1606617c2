package cas_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
)

// crashEnv is an environment variable. If it is set, this test program runs [crash], and the test kills it.
const crashEnv = "PREBAKE_CAS_TEST_CRASH"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashEnv); dir != "" {
		crash(dir)
	}
	os.Exit(m.Run())
}

// crash begins a blob, a tree and a work folder in the cache dir. Then it prints "ready" and waits until it is killed.
func crash(dir string) {
	c, err := cas.Open(dir)
	if err != nil {
		panic(err)
	}
	if _, _, err := c.TempDir("compile"); err != nil {
		panic(err)
	}
	ready := make(chan struct{}, 2)
	go func() {
		half := io.MultiReader(strings.NewReader("half a blob"), &blocker{ready: ready})
		_, _, _ = c.PutBlob(context.Background(), half, "")
	}()
	go func() {
		_, _, _ = c.Tree(context.Background(), "headers", "half", func(_ context.Context, dir string) error {
			if err := os.WriteFile(filepath.Join(dir, "half"), []byte("x"), 0o644); err != nil {
				panic(err)
			}
			ready <- struct{}{}
			select {}
		})
	}()
	<-ready
	<-ready
	fmt.Println("ready")
	time.Sleep(time.Hour) // the test kills the process long before
}

type blocker struct{ ready chan struct{} }

func (b *blocker) Read([]byte) (int, error) {
	b.ready <- struct{}{}
	select {}
}

func open(t *testing.T, dir string) *cas.Cache {
	t.Helper()
	c, err := cas.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// files returns the paths of all regular files below dir.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			all = append(all, path[len(dir)+1:])
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

const (
	hello    = "hello"
	helloSum = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
)

func TestPutBlob(t *testing.T) {
	t.Parallel()
	c := open(t, t.TempDir())
	if _, ok := c.Blob(helloSum); ok {
		t.Fatal("an empty cache has a blob")
	}
	for _, want := range []string{"", helloSum} {
		digest, size, err := c.PutBlob(t.Context(), strings.NewReader(hello), want)
		if digest != helloSum || size != 5 || err != nil {
			t.Errorf("PutBlob(hello, %q) = %s, %d, %v; want %s, 5, nil", want, digest, size, err, helloSum)
		}
	}
	path, ok := c.Blob(helloSum)
	if b, err := os.ReadFile(path); !ok || err != nil || string(b) != hello {
		t.Errorf("Blob(hello) = %q, %t: %q, %v", path, ok, b, err)
	}
	if err := c.Verify(t.Context(), helloSum); err != nil {
		t.Errorf("Verify(hello) = %v", err)
	}
}

func TestPutBlobRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := open(t, dir)
	before := files(t, dir)
	broken := errors.New("line dropped")
	rows := []struct {
		name string
		r    io.Reader
		want string
		ok   func(error) bool
	}{
		{"other bytes", strings.NewReader("hallo"), helloSum, func(err error) bool { return fault.Is(err, fault.Checksum) }},
		{"cut short", io.MultiReader(strings.NewReader("hel"), iotest.ErrReader(broken)), "",
			func(err error) bool { return errors.Is(err, broken) }},
		{"not a digest", strings.NewReader(hello), "md5:abc", func(err error) bool { return err != nil }},
		{"path for a digest", strings.NewReader(hello), "sha256:../../x", func(err error) bool { return err != nil }},
	}
	for _, r := range rows {
		if _, _, err := c.PutBlob(t.Context(), r.r, r.want); !r.ok(err) {
			t.Errorf("%s: PutBlob = %v", r.name, err)
		}
	}
	if diff := cmp.Diff(before, files(t, dir)); diff != "" {
		t.Errorf("refused blobs left files behind (-before +after):\n%s", diff)
	}
}

func TestVerifyRemovesADamagedBlob(t *testing.T) {
	t.Parallel()
	c := open(t, t.TempDir())
	if _, _, err := c.PutBlob(t.Context(), strings.NewReader(hello), ""); err != nil {
		t.Fatal(err)
	}
	path, _ := c.Blob(helloSum)
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("hallo"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := c.Verify(t.Context(), helloSum); !fault.Is(err, fault.Checksum) {
		t.Errorf("Verify of a damaged blob = %v; want a checksum fault", err)
	}
	if _, ok := c.Blob(helloSum); ok {
		t.Error("the damaged blob is still there")
	}
}

func TestTreeIsMadeOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var made atomic.Int32
	fill := func(_ context.Context, dir string) error {
		made.Add(1)
		return os.WriteFile(filepath.Join(dir, "a"), []byte("a"), 0o644)
	}
	var wg sync.WaitGroup
	var hits atomic.Int32
	caches := []*cas.Cache{open(t, dir), open(t, dir)}
	for i := range 8 {
		wg.Go(func() {
			path, cached, err := caches[i%2].Tree(t.Context(), "headers", helloSum, fill)
			if err != nil {
				t.Error(err)
				return
			}
			if cached {
				hits.Add(1)
			}
			if b, err := os.ReadFile(filepath.Join(path, "a")); err != nil || string(b) != "a" {
				t.Errorf("tree holds %q, %v", b, err)
			}
		})
	}
	wg.Wait()
	if made.Load() != 1 || hits.Load() != 7 {
		t.Errorf("tree was made %d times and found %d times; want 1 and 7", made.Load(), hits.Load())
	}
}

// TestDamagedTreeIsMadeAgain checks that Tree notices any change of a tree and makes the tree again.
func TestDamagedTreeIsMadeAgain(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name   string
		damage func(cache, tree string) error
	}{
		{"truncated file", func(_, tree string) error { return os.Truncate(filepath.Join(tree, "nvidia.ko"), 3) }},
		{"flipped bit", func(_, tree string) error {
			return os.WriteFile(filepath.Join(tree, "nvidia.ko"), []byte("modulf"), 0o644)
		}},
		{"lost file", func(_, tree string) error { return os.Remove(filepath.Join(tree, "nvidia.ko")) }},
		{"added file", func(_, tree string) error { return os.WriteFile(filepath.Join(tree, "extra.ko"), nil, 0o644) }},
		{"other link", func(_, tree string) error {
			return errors.Join(os.Remove(filepath.Join(tree, "link")), os.Symlink("extra", filepath.Join(tree, "link")))
		}},
		{"now executable", func(_, tree string) error { return os.Chmod(filepath.Join(tree, "nvidia.ko"), 0o755) }},
		{"no seal", func(cache, _ string) error { return os.RemoveAll(filepath.Join(cache, "seals")) }},
		{"empty seal", func(cache, _ string) error { return os.Truncate(filepath.Join(cache, "seals/modules/k"), 0) }},
		{"device in its place", func(_, tree string) error {
			return errors.Join(os.Remove(filepath.Join(tree, "link")), syscall.Mkfifo(filepath.Join(tree, "link"), 0o600))
		}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			c := open(t, dir)
			var said []string
			c.Notify = func(text string) { said = append(said, text) }
			fill := func(_ context.Context, dir string) error {
				return errors.Join(os.WriteFile(filepath.Join(dir, "nvidia.ko"), []byte("module"), 0o644),
					os.Symlink("nvidia.ko", filepath.Join(dir, "link")))
			}
			tree := func() (path string, cached bool) {
				t.Helper()
				path, cached, err := c.Tree(t.Context(), "modules", "k", fill)
				if err != nil {
					t.Fatal(err)
				}
				return path, cached
			}
			path, _ := tree()
			if _, cached := tree(); !cached || len(said) > 0 {
				t.Fatalf("an intact tree: cached %t, said %q; want it found in silence", cached, said)
			}
			if err := row.damage(dir, path); err != nil {
				t.Fatal(err)
			}
			if _, cached := tree(); cached || len(said) != 1 || !strings.Contains(said[0], "modules/k") {
				t.Errorf("a damaged tree: cached %t, said %q; want it made again and named", cached, said)
			}
			if _, cached := tree(); !cached {
				t.Error("the tree that was made again is not found")
			}
			if text, err := os.ReadFile(filepath.Join(path, "nvidia.ko")); err != nil || string(text) != "module" {
				t.Errorf("the tree holds %q, %v; want module", text, err)
			}
			if left, err := os.ReadDir(path); err != nil || len(left) != 2 {
				t.Errorf("the tree holds %v, %v; want two files", left, err)
			}
		})
	}
}

// TestTreeIsNotDamagedByCancelling checks that a cancelled call of Tree ends, and does not take the tree for damaged.
func TestTreeIsNotDamagedByCancelling(t *testing.T) {
	t.Parallel()
	c := open(t, t.TempDir())
	fill := func(_ context.Context, dir string) error {
		return os.WriteFile(filepath.Join(dir, "a"), []byte("a"), 0o644)
	}
	if _, _, err := c.Tree(t.Context(), "headers", "k", fill); err != nil {
		t.Fatal(err)
	}
	why := errors.New("told to stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if _, _, err := c.Tree(ctx, "headers", "k", nil); !errors.Is(err, why) {
		t.Errorf("Tree with an ended context = %v; want its cause", err)
	}
	if _, cached, err := c.Tree(t.Context(), "headers", "k", nil); err != nil || !cached {
		t.Errorf("Tree afterwards = %t, %v; want it found", cached, err)
	}
}

func TestTreeOfAFailure(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := open(t, dir)
	boom := errors.New("boom")
	_, _, err := c.Tree(t.Context(), "headers", "k", func(_ context.Context, dir string) error {
		if err := os.WriteFile(filepath.Join(dir, "half"), nil, 0o644); err != nil {
			return err
		}
		return boom
	})
	if !errors.Is(err, boom) {
		t.Errorf("Tree = %v; want %v", err, boom)
	}
	for _, f := range files(t, dir) {
		if filepath.Base(f) == "half" {
			t.Errorf("a failed tree left %s", f)
		}
	}
	for _, key := range []string{"", "..", "a/b", "../x", strings.Repeat("k", 300)} {
		if _, _, err := c.Tree(t.Context(), "headers", key, nil); err == nil {
			t.Errorf("Tree accepted the key %.20q", key)
		}
	}
	path, cached, err := c.Tree(t.Context(), "headers", "k", func(context.Context, string) error { return nil })
	if err != nil || cached || !strings.HasSuffix(path, "/trees/headers/k") {
		t.Errorf("Tree after a failure = %q, %t, %v; want it made", path, cached, err)
	}
}

func TestTreeWaitsNoLongerThanItsContext(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, b := open(t, dir), open(t, dir)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("told to stop")
	_, _, err := a.Tree(t.Context(), "headers", "k", func(context.Context, string) error {
		cancel(why)
		if _, _, err := b.Tree(ctx, "headers", "k", nil); !errors.Is(err, why) {
			t.Errorf("Tree behind a held lock = %v; want the cause", err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestFacts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := open(t, dir)
	key := "https://example.com/a b?c\nmd5:00"
	if _, ok := c.Fact("fetched", key); ok {
		t.Error("Fact of an empty cache found a value")
	}
	for _, value := range []string{"one", "two"} {
		if err := c.PutFact("fetched", key, []byte(value)); err != nil {
			t.Fatal(err)
		}
		if got, ok := open(t, dir).Fact("fetched", key); !ok || string(got) != value {
			t.Errorf("Fact = %q, %t; want %q", got, ok, value)
		}
	}
	facts, err := filepath.Glob(filepath.Join(dir, "facts/fetched/*"))
	if err != nil || len(facts) != 1 {
		t.Fatalf("facts %v, %v; want one", facts, err)
	}
	text, err := os.ReadFile(facts[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, damaged := range []string{"", "two", strings.Replace(string(text), "two", "twp", 1),
		string(text[:len(text)-1])} {
		if err := os.WriteFile(facts[0], []byte(damaged), 0o644); err != nil {
			t.Fatal(err)
		}
		if got, ok := c.Fact("fetched", key); ok {
			t.Errorf("Fact of the damaged fact %q = %q; want it forgotten", damaged, got)
		}
	}
	if err := c.PutFact("../x", key, nil); err == nil {
		t.Error("PutFact accepted ../x as a kind")
	}
}

func TestOpenCleansUpAfterTheDeadOnly(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	alive := open(t, dir)
	work, cleanup, err := alive.TempDir("compile")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), crashEnv+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	half := 0
	for _, f := range files(t, dir) {
		if strings.HasPrefix(f, "tmp/") {
			half++
		}
	}
	if half != 2 {
		t.Fatalf("%d unfinished files before the kill; want a blob and a tree's file", half)
	}
	_ = open(t, dir) // the process is still running, so Open must keep its files
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // the process was killed, so its exit status has no meaning
	c := open(t, dir)
	for _, f := range files(t, dir) {
		if strings.HasPrefix(f, "tmp/") || strings.HasPrefix(f, "blobs/") || strings.HasPrefix(f, "trees/") {
			t.Errorf("the killed process left %s", f)
		}
	}
	if entries, err := os.ReadDir(filepath.Join(dir, "work")); err != nil || len(entries) != 3 {
		t.Errorf("work folders %v, %v; want those of the three that live", entries, err)
	}
	if _, err := os.Stat(work); err != nil {
		t.Errorf("a living owner's work folder: %v", err)
	}
	if err := cleanup(); err != nil {
		t.Error(err)
	}
	// The kernel has released the lock that the killed process held on the tree.
	if _, cached, err := c.Tree(t.Context(), "headers", "half",
		func(context.Context, string) error { return nil }); err != nil || cached {
		t.Errorf("Tree = %t, %v; want it made", cached, err)
	}
}

func TestDigestTree(t *testing.T) {
	t.Parallel()
	make := func(change func(dir string) error) string {
		t.Helper()
		dir := t.TempDir()
		steps := []error{
			os.MkdirAll(filepath.Join(dir, "include/generated"), 0o755),
			os.WriteFile(filepath.Join(dir, "include/a.h"), []byte("a"), 0o644),
			os.WriteFile(filepath.Join(dir, "include/generated/b.h"), []byte("b"), 0o644),
			os.WriteFile(filepath.Join(dir, "tool"), []byte("run"), 0o755),
			os.Symlink("include/a.h", filepath.Join(dir, "link")),
		}
		if err := errors.Join(append(steps, change(dir))...); err != nil {
			t.Fatal(err)
		}
		sum, err := cas.DigestTree(t.Context(), dir, func(p string) bool { return p == "include/generated/b.h" })
		if err != nil {
			t.Fatal(err)
		}
		return sum
	}
	base := make(func(string) error { return nil })
	// Builders search for published artifacts by such digests. If this digest changes, they find no older artifact.
	if want := "sha256:2455ddcd1a936088c1f4af695e2e4c9ed47b9ac301187d189ed5793e79785096"; base != want {
		t.Errorf("DigestTree = %s; want %s", base, want)
	}
	rows := []struct {
		name   string
		change func(dir string) error
		same   bool
	}{
		{"times", func(d string) error {
			return os.Chtimes(filepath.Join(d, "tool"), time.Unix(1, 0), time.Unix(2, 0))
		}, true},
		{"other mode bits", func(d string) error { return os.Chmod(filepath.Join(d, "include/a.h"), 0o600) }, true},
		{"empty folder", func(d string) error { return os.Mkdir(filepath.Join(d, "empty"), 0o755) }, true},
		{"skipped file", func(d string) error {
			return os.WriteFile(filepath.Join(d, "include/generated/b.h"), []byte("c"), 0o644)
		}, true},
		{"content", func(d string) error { return os.WriteFile(filepath.Join(d, "include/a.h"), []byte("b"), 0o644) }, false},
		{"executable bit", func(d string) error { return os.Chmod(filepath.Join(d, "include/a.h"), 0o755) }, false},
		{"name", func(d string) error {
			return os.Rename(filepath.Join(d, "include/a.h"), filepath.Join(d, "include/c.h"))
		}, false},
		{"more files", func(d string) error { return os.WriteFile(filepath.Join(d, "z"), nil, 0o644) }, false},
		{"link's target", func(d string) error {
			return errors.Join(os.Remove(filepath.Join(d, "link")), os.Symlink("tool", filepath.Join(d, "link")))
		}, false},
		{"file for link", func(d string) error {
			return errors.Join(os.Remove(filepath.Join(d, "link")),
				os.WriteFile(filepath.Join(d, "link"), []byte("include/a.h"), 0o644))
		}, false},
	}
	for _, r := range rows {
		if got := make(r.change); (got == base) != r.same {
			t.Errorf("digest with changed %s: same %t; want %t", r.name, got == base, r.same)
		}
	}
}
