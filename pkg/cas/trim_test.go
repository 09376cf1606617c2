package cas_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
)

// fill fills a tree with one file of 64 KiB.
func fill(_ context.Context, dir string) error {
	return os.WriteFile(filepath.Join(dir, "a"), make([]byte, 64<<10), 0o644)
}

func mustTree(t *testing.T, c *cas.Cache, kind, key string) (path string, cached bool) {
	t.Helper()
	path, cached, err := c.Tree(t.Context(), kind, key, fill)
	if err != nil {
		t.Fatal(err)
	}
	return path, cached
}

// age sets the time at which an entry was last used to a time in the past.
func age(t *testing.T, dir, use string, ago time.Duration) {
	t.Helper()
	at := time.Now().Add(-ago)
	if err := os.Chtimes(filepath.Join(dir, "uses", use), at, at); err != nil {
		t.Fatal(err)
	}
}

func mustTrim(t *testing.T, c *cas.Cache, l cas.Limit) *cas.Trimmed {
	t.Helper()
	done, err := c.Trim(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	return done
}

func kinds(t *testing.T, c *cas.Cache) map[string]cas.Kind {
	t.Helper()
	list, err := c.Kinds(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]cas.Kind{}
	for _, k := range list {
		m[k.Name] = k
	}
	return m
}

// agedCache returns a cache with three trees and a blob that nobody uses. Nobody used tree 0 for the longest time.
func agedCache(t *testing.T) (c *cas.Cache, dir string) {
	t.Helper()
	dir = t.TempDir()
	c = open(t, dir)
	end := c.Begin()
	for n := range 3 {
		mustTree(t, c, "modules", fmt.Sprint(n))
	}
	if _, _, err := c.PutBlob(t.Context(), strings.NewReader(hello), ""); err != nil {
		t.Fatal(err)
	}
	end()
	for n := range 3 {
		age(t, dir, "modules@"+fmt.Sprint(n), time.Duration(10-n)*time.Hour)
	}
	age(t, dir, "blob@"+helloSum[len("sha256:"):], time.Hour)
	return c, dir
}

func TestTrim(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name  string
		limit func(size int64) cas.Limit
		left  []string // what must be left: trees by their number, and "blob"
	}{
		{"no limit", func(int64) cas.Limit { return cas.Limit{} }, []string{"0", "1", "2", "blob"}},
		{"large enough", func(n int64) cas.Limit { return cas.Limit{Bytes: n} }, []string{"0", "1", "2", "blob"}},
		{"a byte too large", func(n int64) cas.Limit { return cas.Limit{Bytes: n - 1} }, []string{"1", "2", "blob"}},
		{"two trees too large", func(n int64) cas.Limit { return cas.Limit{Bytes: n - 100<<10} }, []string{"2", "blob"}},
		{"all", func(int64) cas.Limit { return cas.Limit{Bytes: 1} }, nil},
		{"old", func(int64) cas.Limit { return cas.Limit{OlderThan: 9*time.Hour - time.Minute} }, []string{"2", "blob"}},
		{"disk never free enough", func(int64) cas.Limit { return cas.Limit{MinFree: 1 << 60} }, nil},
		{"disk free enough", func(int64) cas.Limit { return cas.Limit{MinFree: 1} }, []string{"0", "1", "2", "blob"}},
		{"dry run", func(int64) cas.Limit { return cas.Limit{Bytes: 1, DryRun: true} }, []string{"0", "1", "2", "blob"}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			c, dir := agedCache(t)
			size := mustTrim(t, c, cas.Limit{}).Left
			done := mustTrim(t, c, row.limit(size))
			var left []string
			for n := range 3 {
				if _, err := os.Stat(filepath.Join(dir, "trees/modules", fmt.Sprint(n))); err == nil {
					left = append(left, fmt.Sprint(n))
				}
			}
			if _, ok := c.Blob(helloSum); ok {
				left = append(left, "blob")
			}
			if diff := cmp.Diff(row.left, left); diff != "" {
				t.Errorf("left after Trim (-want +got):\n%s", diff)
			}
			if want := 4 - len(row.left); done.Removed != want && !row.limit(size).DryRun || done.Left != size-done.Freed ||
				done.InUse != 0 {
				t.Errorf("Trim = %+v of %d bytes; want %d removed", done, size, want)
			}
			if row.limit(size).DryRun && done.Removed != 4 {
				t.Errorf("dry run = %+v; want 4 entries that Trim would remove", done)
			}
			// Tree must make a tree again that Trim removed.
			if _, cached := mustTree(t, c, "modules", "0"); cached != (len(left) == 4) {
				t.Errorf("tree 0 is cached: %t", cached)
			}
			if entries, err := filepath.Glob(filepath.Join(dir, "tmp/*/*")); err != nil || len(entries) > 0 {
				t.Errorf("Trim left %v, %v", entries, err)
			}
		})
	}
}

// TestTrimLeavesWhatIsInUse checks that Trim does not remove an entry that is in use, be it by another process or by a
// piece of work in this process.
func TestTrimLeavesWhatIsInUse(t *testing.T) {
	t.Parallel()
	c, dir := agedCache(t)
	other, err := cas.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	mustTree(t, other, "modules", "0")
	age(t, dir, "modules@0", 20*time.Hour)
	end := c.Begin()
	endLater := c.Begin()
	mustTree(t, c, "modules", "1")
	if k := kinds(t, c)["modules"]; k.InUse != 2 || k.Entries != 3 || k.Bytes < 3*64<<10 {
		t.Errorf("kinds = %+v; want two of three in use", k)
	}
	for _, step := range []struct {
		name  string
		do    func()
		inUse int
	}{
		{"all of it", func() {}, 2},
		{"one work has ended, a concurrent one has not", end, 2},
		{"both have ended", endLater, 1},
	} {
		step.do()
		if done := mustTrim(t, c, cas.Limit{Bytes: 1}); done.InUse != step.inUse {
			t.Errorf("%s: Trim = %+v; want %d in use", step.name, done, step.inUse)
		}
		if _, err := os.Stat(filepath.Join(dir, "trees/modules/0/a")); err != nil {
			t.Errorf("%s: Trim removed a tree that another cache uses: %v", step.name, err)
		}
	}
	end() // a second call does nothing
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if done := mustTrim(t, c, cas.Limit{Bytes: 1}); done.InUse != 0 || done.Removed != 1 {
		t.Errorf("after Close of the other cache: Trim = %+v; want its tree removed", done)
	}
}

// TestTrimAgainstUse trims a cache while others use it. Each caller of Tree must get a complete tree, which must stay
// until the caller's piece of work ends.
func TestTrimAgainstUse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	trimmer := open(t, dir)
	var trims sync.WaitGroup
	var removed atomic.Int64
	trims.Go(func() {
		defer stop()
		for ctx.Err() == nil {
			done, err := trimmer.Trim(ctx, cas.Limit{Bytes: 1})
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
				return
			}
			removed.Add(int64(done.Removed))
		}
	})
	var users sync.WaitGroup
	for user := range 3 {
		c := open(t, dir)
		users.Go(func() {
			for n := 0; n < 60 || removed.Load() == 0 && ctx.Err() == nil; n++ { // until Trim removed something
				end := c.Begin()
				// The cache has five trees, and at most three of them are in use at the same time.
				path, _, err := c.Tree(t.Context(), "headers", fmt.Sprint((n+user)%5), fill)
				if err != nil {
					t.Error(err)
				} else if raw, err := os.ReadFile(filepath.Join(path, "a")); err != nil || len(raw) != 64<<10 {
					t.Errorf("the tree holds %d bytes, %v", len(raw), err)
				}
				end()
			}
		})
	}
	users.Wait()
	stop()
	trims.Wait()
}

// TestTrimWithoutStamps checks a cache without stamps, the files that record when an entry was last used. Older
// versions of the program wrote none. Kinds and a dry run must not create stamps, because a later Trim must use the
// entries' own times.
func TestTrimWithoutStamps(t *testing.T) {
	t.Parallel()
	c, dir := agedCache(t)
	if err := os.RemoveAll(filepath.Join(dir, "uses")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "uses"), 0o755); err != nil {
		t.Fatal(err)
	}
	for n, ago := range []time.Duration{time.Hour, 30 * time.Hour, 2 * time.Hour} {
		if err := os.Chtimes(filepath.Join(dir, "trees/modules", fmt.Sprint(n)), time.Now(),
			time.Now().Add(-ago)); err != nil {
			t.Fatal(err)
		}
	}
	kinds(t, c)
	mustTrim(t, c, cas.Limit{Bytes: 1, DryRun: true})
	if left, err := os.ReadDir(filepath.Join(dir, "uses")); err != nil || len(left) > 0 {
		t.Errorf("Kinds and a dry run of Trim left %v, %v in uses/; want nothing", left, err)
	}
	mustTrim(t, c, cas.Limit{OlderThan: 20 * time.Hour})
	if left, err := os.ReadDir(filepath.Join(dir, "trees/modules")); err != nil || len(left) != 2 ||
		left[0].Name() != "0" {
		t.Errorf("left after Trim: %v, %v; want 0 and 2", left, err)
	}
}

// TestTrimFactsLast checks that Trim removes facts last. Facts are small, and it took long to find them out.
func TestTrimFactsLast(t *testing.T) {
	t.Parallel()
	c, dir := agedCache(t)
	if err := c.PutFact("verdict", "k", []byte("v")); err != nil {
		t.Fatal(err)
	}
	facts, err := filepath.Glob(filepath.Join(dir, "facts/verdict/*"))
	if err != nil || len(facts) != 1 {
		t.Fatal(facts, err)
	}
	ago := time.Now().Add(-1000 * time.Hour)
	if err := os.Chtimes(facts[0], ago, ago); err != nil {
		t.Fatal(err)
	}
	size := mustTrim(t, c, cas.Limit{}).Left
	mustTrim(t, c, cas.Limit{Bytes: size - 100<<10})
	if _, err := os.Stat(facts[0]); err != nil {
		t.Errorf("Trim removed the fact before the trees: %v", err)
	}
	mustTrim(t, c, cas.Limit{OlderThan: 999 * time.Hour})
	if _, err := os.Stat(facts[0]); err == nil {
		t.Error("a fact that is too old is still there")
	}
}

// TestTrimIsBusy checks that Trim does nothing while another process trims the same cache.
func TestTrimIsBusy(t *testing.T) {
	t.Parallel()
	c, dir := agedCache(t)
	lock, err := os.OpenFile(filepath.Join(dir, "trim.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if done := mustTrim(t, c, cas.Limit{Bytes: 1}); !done.Busy || done.Removed != 0 {
		t.Errorf("Trim beside another one = %+v; want busy and nothing done", done)
	}
}

// TestTrimForeign checks files in folders that do not belong to the cache. Kinds must count them, and Trim must not
// remove them.
func TestTrimForeign(t *testing.T) {
	t.Parallel()
	c, dir := agedCache(t)
	write := func(name string, ago time.Duration) {
		t.Helper()
		path := filepath.Join(dir, name)
		err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, make([]byte, 8<<10), 0o644),
			os.Chtimes(path, time.Now().Add(-ago), time.Now().Add(-ago)))
		if err != nil {
			t.Fatal(err)
		}
	}
	foreign := []string{"keys/prebake.key", "registry/blobs/sha256/0", "logs/notes.txt", "wish.yaml"}
	for _, name := range foreign {
		write(name, 30*time.Hour)
	}
	write("logs/old.log", 30*time.Hour)
	write("logs/new.log", 0)
	if err := c.PutFact("verdict", "k", []byte("v")); err != nil {
		t.Fatal(err)
	}
	k := kinds(t, c)
	if k["keys"].Entries != 1 || k["keys"].Bytes != 8<<10 || k["registry"].Entries != 1 || k["logs"].Entries != 1 ||
		k["fact:verdict"].Entries != 1 || k["blob"].Entries != 1 || k["records"].Entries == 0 {
		t.Errorf("kinds = %+v; want the foreign files, an old log, a fact, a blob and records", k)
	}
	mustTrim(t, c, cas.Limit{OlderThan: 20 * time.Hour})
	if _, ok := c.Fact("verdict", "k"); !ok {
		t.Error("a fresh fact is gone")
	}
	mustTrim(t, c, cas.Limit{Bytes: 1})
	if _, ok := c.Fact("verdict", "k"); ok {
		t.Error("Trim of everything left a fact")
	}
	for _, name := range append(foreign, "logs/new.log") {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Errorf("after Trim of everything: %v", err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "logs/old.log")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an old log: %v; want it removed", err)
	}
}

// TestTrimLimitWithoutForeign checks that files in foreign folders do not count against the size limit. Otherwise Trim
// would remove all entries.
func TestTrimLimitWithoutForeign(t *testing.T) {
	t.Parallel()
	c, dir := agedCache(t)
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "registry"), 0o755),
		os.WriteFile(filepath.Join(dir, "registry/blob"), make([]byte, 64<<20), 0o644)); err != nil {
		t.Fatal(err)
	}
	if done := mustTrim(t, c, cas.Limit{Bytes: 32 << 20}); done.Removed != 0 || done.Left >= 32<<20 {
		t.Errorf("Trim = %+v; want nothing removed", done)
	}
}

// TestOpenRefusesOtherFolders checks that Open refuses a folder with other files, such as the parent of a cache that
// somebody gives by mistake.
func TestOpenRefusesOtherFolders(t *testing.T) {
	t.Parallel()
	for name, refused := range map[string]bool{
		"keys/key": true, "a.txt": true, "blobs/sha256/0": true, "tmp/x": true, "logs/a.log": true,
		"lost+found/x": false, ".snapshot/x": false, "trees/x": false, "owners/x": false,
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		c, err := cas.Open(dir)
		if refused != (err != nil) || refused && (!fault.Is(err, fault.Usage) || fault.Hint(err) == "") {
			t.Errorf("Open of a folder with %s = %v; want refused %v", name, err, refused)
		}
		if err == nil {
			_ = c.Close()
		}
		list, err := os.ReadDir(dir)
		if refused && (err != nil || len(list) != 1) {
			t.Errorf("Open left %v, %v in a folder that it refused", list, err)
		}
	}
}

func TestRoom(t *testing.T) {
	t.Parallel()
	c := open(t, t.TempDir())
	if err := c.CheckFree(1); err != nil {
		t.Errorf("CheckFree(1) = %v", err)
	}
	err := c.CheckFree(1 << 60)
	if !fault.Is(err, fault.DiskFull) || !strings.Contains(err.Error(), "MiB free; want 1099511627776 MiB") ||
		!strings.Contains(fault.Hint(err), "builder cache trim") {
		t.Errorf("CheckFree(1 EiB) = %v, hint %q; want disk full with both numbers", err, fault.Hint(err))
	}
}

func TestTrimEndsWithItsContext(t *testing.T) {
	t.Parallel()
	c, dir := agedCache(t)
	why := errors.New("told to stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if _, err := c.Trim(ctx, cas.Limit{Bytes: 1}); !errors.Is(err, why) {
		t.Errorf("Trim = %v; want %v", err, why)
	}
	if _, err := os.Stat(filepath.Join(dir, "trees/modules/0")); err != nil {
		t.Error(err)
	}
}
