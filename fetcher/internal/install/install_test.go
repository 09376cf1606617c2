package install_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

func digest(c string) string { return "sha256:" + strings.Repeat(c, 64) }

// folder is an install folder, with the root of the node that has it.
type folder struct {
	*install.Store
	node *noderoot.Root
}

func (f *folder) Dir() string             { return filepath.Join(f.node.Dir(), "nvidia") }
func (f *folder) Path(name string) string { return filepath.Join(f.Dir(), ".prebake", name) }

func open(t *testing.T) *folder {
	t.Helper()
	node, err := noderoot.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	opened, err := install.Open(node, "/nvidia", true)
	if err != nil {
		t.Fatal(err)
	}
	s := &folder{opened, node}
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), node.Close()); err != nil {
			t.Error(err)
		}
	})
	return s
}

// add stages a driver with one layer that has these folders. All digits of both digests are c.
func add(t *testing.T, s *folder, c string, dirs ...string) install.Set {
	t.Helper()
	l := install.Layer{Kind: bundle.LayerUserspace, Digest: digest(c)}
	err := s.AddLayer(l, func(dst *os.Root) error {
		for _, dir := range dirs {
			if err := dst.Mkdir(dir, 0o755); err != nil {
				return err
			}
			if err := dst.WriteFile(dir+"/who", []byte(c), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	set := install.Set{Digest: digest(c), Driver: target.Driver{Version: "535.1." + c, Flavour: target.Open},
		Layers: []install.Layer{l}}
	if err := s.AddSet(set, []byte("proof")); err != nil {
		t.Fatal(err)
	}
	return set
}

// who returns which set has each top-level folder, by the text of its file who.
func who(t *testing.T, s *folder) map[string]string {
	t.Helper()
	seen := map[string]string{}
	for _, name := range []string{"bin", "lib64", "share", "vulkan", "drivers", "firmware"} {
		raw, err := os.ReadFile(filepath.Join(s.Dir(), name, "who"))
		if errors.Is(err, os.ErrNotExist) {
			if _, err := os.Lstat(filepath.Join(s.Dir(), name)); err == nil {
				seen[name] = "(dangling)"
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		seen[name] = string(raw)
	}
	return seen
}

func TestSwitchAndRestore(t *testing.T) {
	t.Parallel()
	s := open(t)
	if err := os.MkdirAll(filepath.Join(s.Dir(), "lib64"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.Dir(), "lib64/who"), []byte("google"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(s.Dir(), "elsewhere"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.Dir(), "elsewhere/who"), []byte("link"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("elsewhere", filepath.Join(s.Dir(), "bin")); err != nil {
		t.Fatal(err)
	}
	nothing, err := s.Pointers()
	if err != nil {
		t.Fatal(err)
	}
	one, two := add(t, s, "1", "bin", "lib64", "vulkan"), add(t, s, "2", "bin", "lib64")
	steps := []struct {
		name string
		do   func() error
		want map[string]string
	}{
		{"first", func() error { return s.Switch(one.Digest) }, map[string]string{"bin": "1", "lib64": "1", "vulkan": "1"}},
		{"again", func() error { return s.Switch(one.Digest) }, map[string]string{"bin": "1", "lib64": "1", "vulkan": "1"}},
		{"second has no vulkan", func() error { return s.Switch(two.Digest) }, map[string]string{"bin": "2", "lib64": "2"}},
		{"unknown set", func() error {
			if s.Switch(digest("9")) == nil {
				return errors.New("Switch to an unknown set succeeded")
			}
			return nil
		}, map[string]string{"bin": "2", "lib64": "2"}},
		{"back", func() error { return s.Switch(one.Digest) }, map[string]string{"bin": "1", "lib64": "1", "vulkan": "1"}},
		{"nothing of ours", func() error { return s.Restore(nothing) }, map[string]string{"lib64": "google", "bin": "link"}},
		{"and once more", func() error { return s.Switch(two.Digest) }, map[string]string{"bin": "2", "lib64": "2"}},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if diff := cmp.Diff(step.want, who(t, s)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step.name, diff)
		}
	}
	// The links must still work if the install folder is mounted elsewhere.
	moved := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.Rename(s.Dir(), moved); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(moved, "lib64/who"))
	if err != nil || string(raw) != "2" {
		t.Errorf("moved install folder: lib64 leads to %q, %v", raw, err)
	}
}

func TestAddLayerFails(t *testing.T) {
	t.Parallel()
	s := open(t)
	want := errors.New("digest differs")
	err := s.AddLayer(install.Layer{Kind: bundle.LayerUserspace, Digest: digest("1")}, func(dst *os.Root) error {
		return errors.Join(dst.WriteFile("half", []byte("x"), 0o644), want)
	})
	if !errors.Is(err, want) || s.HasLayer(digest("1")) {
		t.Errorf("AddLayer = %v, HasLayer %v; want the cause and no layer", err, s.HasLayer(digest("1")))
	}
	left, err := filepath.Glob(s.Path("tmp-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind %v, %v", left, err)
	}
	for _, bad := range []string{"", "sha256:../x", "md5:" + strings.Repeat("1", 64), digest("A")} {
		if err := s.AddLayer(install.Layer{Kind: bundle.LayerUserspace, Digest: bad},
			func(*os.Root) error { return nil }); !fault.Is(err, fault.Unverified) {
			t.Errorf("AddLayer(%q) = %v; want unverified", bad, err)
		}
	}
}

func TestSweep(t *testing.T) {
	t.Parallel()
	s := open(t)
	for _, c := range []string{"1", "2", "3"} {
		if err := s.Switch(add(t, s, c, "bin").Digest); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(s.Path("tmp-interrupted"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.Sweep(); err != nil {
		t.Fatal(err)
	}
	for c, want := range map[string]bool{"1": false, "2": true, "3": true} {
		if got := s.HasLayer(digest(c)); got != want {
			t.Errorf("after Sweep, HasLayer(%s) = %v; want %v", c, got, want)
		}
	}
	if _, err := os.Stat(s.Path("tmp-interrupted")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Sweep left the interrupted folder: %v", err)
	}
	cur, err := s.Current()
	prev, err2 := s.Previous()
	if err := errors.Join(err, err2); err != nil || cur.Digest != digest("3") || prev.Digest != digest("2") {
		t.Errorf("Current = %+v, Previous = %+v, %v; want 3 and 2", cur, prev, err)
	}
}

func TestLock(t *testing.T) {
	t.Parallel()
	s := open(t)
	const google = "tmp/lock"
	if err := os.Mkdir(filepath.Join(s.node.Dir(), "tmp"), 0o777); err != nil {
		t.Fatal(err)
	}
	unlock, err := s.Lock(google)
	if err != nil {
		t.Fatal(err)
	}
	again, err := install.Open(s.node, "/nvidia", false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.Lock(google); !fault.Is(err, fault.Busy) {
		t.Errorf("second Lock = %v; want busy", err)
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
	unlock, err = again.Lock(google)
	if err != nil {
		t.Fatalf("Lock after unlock = %v", err)
	}
	if err := errors.Join(unlock(), again.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestLockPlanted checks that Lock refuses a link or a folder that another user put in the place of the lock file.
// Google's lock is in /tmp, where everybody may write.
func TestLockPlanted(t *testing.T) {
	t.Parallel()
	for name, plant := range map[string]func(at string) error{
		"a link to nothing":       func(at string) error { return os.Symlink("../etc/made", at) },
		"an absolute one":         func(at string) error { return os.Symlink("/etc/made", at) },
		"a link to a file":        func(at string) error { return os.Symlink("../etc/passwd", at) },
		"an absolute one to such": func(at string) error { return os.Symlink("/etc/passwd", at) },
		"a folder":                func(at string) error { return os.Mkdir(at, 0o777) },
	} {
		s := open(t)
		root := s.node.Dir()
		if err := errors.Join(os.Mkdir(filepath.Join(root, "tmp"), 0o777), os.Mkdir(filepath.Join(root, "etc"), 0o755),
			os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("x"), 0o644),
			plant(filepath.Join(root, "tmp/lock"))); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Lock("tmp/lock"); err == nil || !strings.Contains(err.Error(), "lock file /tmp/lock") {
			t.Errorf("%s: Lock = %v; want an error", name, err)
		}
		if _, err := os.Lstat(filepath.Join(root, "etc/made")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: a file was made where the link leads", name)
		}
		if err := os.RemoveAll(filepath.Join(root, "tmp/lock")); err != nil {
			t.Fatal(err)
		}
		unlock, err := s.Lock("tmp/lock") // the failed Lock must have released the agent's own lock
		if err != nil {
			t.Errorf("%s: Lock afterwards = %v", name, err)
		} else if err := unlock(); err != nil {
			t.Error(err)
		}
	}
}

func TestCorruptSet(t *testing.T) {
	t.Parallel()
	s := open(t)
	set := add(t, s, "1", "bin")
	if err := s.Switch(set.Digest); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.Path("current/set.json"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	// A damaged set may need any layer, so Sweep must keep all layers.
	if got, err := s.Current(); err != nil || got == nil || !got.Damaged || got.Digest != set.Digest {
		t.Errorf("Current with a broken set.json = %+v, %v; want a damaged one", got, err)
	}
	if err := errors.Join(s.Recover(), s.Sweep()); err != nil {
		t.Fatal(err)
	}
	if got := who(t, s); got["bin"] != "1" {
		t.Errorf("after a sweep names lead to %v", got)
	}
}

// TestOddThings checks that AddLayer and AddSet replace a file or folder that is in the place of their own.
func TestOddThings(t *testing.T) {
	t.Parallel()
	s := open(t)
	if err := os.WriteFile(s.Path("layers/"+strings.Repeat("1", 64)), []byte("a file"), 0o644); err != nil {
		t.Fatal(err)
	}
	set := add(t, s, "1", "bin")
	for _, name := range []string{"set.json", "proof.json"} {
		at := filepath.Join(s.Path("sets/"+strings.Repeat("1", 64)), name)
		if err := errors.Join(os.Remove(at), os.MkdirAll(filepath.Join(at, "x"), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.AddSet(set, []byte("proof")); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Set(set.Digest); err != nil || got == nil || got.Damaged {
		t.Errorf("Set = %+v, %v", got, err)
	}
}

// TestSweepTakesNamesFirst checks that Sweep renames a layer before it removes the layer's files. So a layer under its
// final name is complete at every moment.
func TestSweepTakesNamesFirst(t *testing.T) {
	t.Parallel()
	s := open(t)
	const files = 2000
	old := install.Layer{Kind: bundle.LayerUserspace, Digest: digest("a")}
	err := s.AddLayer(install.Layer{Kind: bundle.LayerUserspace, Digest: old.Digest}, func(dst *os.Root) error {
		if err := dst.Mkdir("lib64", 0o755); err != nil {
			return err
		}
		for i := range files {
			if err := dst.WriteFile(fmt.Sprintf("lib64/%04d", i), nil, 0o644); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	kept := add(t, s, "1", "lib64")
	if err := s.Switch(kept.Digest); err != nil {
		t.Fatal(err)
	}
	swept, looked := make(chan error, 1), 0
	go func() { swept <- s.Sweep() }()
	dir := filepath.Join(s.Dir(), ".prebake/layers", strings.Repeat("a", 64), "lib64")
	for done := false; !done; looked++ {
		select {
		case err := <-swept:
			if done = true; err != nil {
				t.Fatal(err)
			}
		default:
		}
		entries, err := os.ReadDir(dir)
		if err == nil && len(entries) != files {
			// ReadDir is not atomic: Sweep may have renamed the layer meanwhile.
			if s.HasLayer(old.Digest) {
				t.Fatalf("check %d: the layer has %d of %d files under its final name", looked, len(entries), files)
			}
		}
	}
	if s.HasLayer(old.Digest) || !s.HasLayer(digest("1")) {
		t.Errorf("after the sweep: old layer %t, the active one %t", s.HasLayer(old.Digest), s.HasLayer(digest("1")))
	}
	if left, err := filepath.Glob(filepath.Join(s.Dir(), ".prebake/tmp-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestHeal kills the removal of a driver at several points. Recover must complete the removal, and restore the files of
// another installer.
func TestHeal(t *testing.T) {
	t.Parallel()
	for name, kill := range map[string]func(s *folder) error{
		"the pointer is gone, as former versions did it first": func(s *folder) error {
			return os.Remove(filepath.Join(s.Dir(), ".prebake/current"))
		},
		"the set is gone": func(s *folder) error { return os.RemoveAll(filepath.Join(s.Dir(), ".prebake/sets")) },
		"some names are gone": func(s *folder) error {
			return errors.Join(os.Remove(filepath.Join(s.Dir(), "bin")), os.Remove(filepath.Join(s.Dir(), ".prebake/current")))
		},
		"nothing is left to do": func(s *folder) error { return s.Restore(install.Pointers{}) },
	} {
		s := open(t)
		if err := errors.Join(os.MkdirAll(filepath.Join(s.Dir(), "lib64"), 0o755),
			os.WriteFile(filepath.Join(s.Dir(), "lib64/who"), []byte("google"), 0o644)); err != nil {
			t.Fatal(err)
		}
		if err := s.Switch(add(t, s, "1", "bin", "lib64").Digest); err != nil {
			t.Fatal(err)
		}
		if err := kill(s); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := s.Recover(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if diff := cmp.Diff(map[string]string{"lib64": "google"}, who(t, s)); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
		}
	}
}

// TestCopiedPointers puts files and folders in the place of the pointers, as in a copy of the install folder without
// links. They must not make any call fail, and they must stay on the disk.
func TestCopiedPointers(t *testing.T) {
	t.Parallel()
	folder := func(files map[string]string) func(at string) error {
		return func(at string) error {
			errs := []error{os.Mkdir(at, 0o755)}
			for name, text := range files {
				errs = append(errs, os.WriteFile(filepath.Join(at, name), []byte(text), 0o644))
			}
			return errors.Join(errs...)
		}
	}
	description := func(digest string) string { return fmt.Sprintf(`{"digest":%q}`, digest) }
	for name, row := range map[string]struct {
		put     func(at string) error
		pointer string // the set that the file or folder counts as; "" means none
	}{
		"a copy of the set":            {folder(map[string]string{"set.json": description(digest("2")), "x": "x"}), "2"},
		"a copy of another set":        {folder(map[string]string{"set.json": description(digest("1")), "x": "x"}), "1"},
		"a copy of a set that is gone": {folder(map[string]string{"set.json": description(digest("9")), "x": "x"}), ""},
		"a damaged copy":               {folder(map[string]string{"set.json": "{", "x": "x"}), ""},
		"a folder outside":             {folder(map[string]string{"set.json": description("sha256:../x"), "x": "x"}), ""},
		"some folder":                  {folder(map[string]string{"x": "x"}), ""},
		"an empty folder":              {folder(nil), ""},
		"a file":                       {func(at string) error { return os.WriteFile(at, []byte("x"), 0o644) }, ""},
	} {
		for _, pointer := range []string{"current", "previous"} {
			t.Run(name+" as "+pointer, func(t *testing.T) {
				t.Parallel()
				s := open(t)
				add(t, s, "1", "bin")
				add(t, s, "2", "bin", "lib64")
				if err := errors.Join(s.Switch(digest("1")), s.Switch(digest("2"))); err != nil {
					t.Fatal(err)
				}
				var want []string
				for i := range 2 { // the second file or folder must not replace the first one
					if err := errors.Join(os.Remove(s.Path(pointer)), row.put(s.Path(pointer))); err != nil {
						t.Fatal(err)
					}
					before, err := os.Stat(s.Path(pointer))
					if err != nil {
						t.Fatal(err)
					}
					if got := s.NotLinks(); len(got) != 1 || got[0] != pointer {
						t.Errorf("NotLinks = %q; want %s", got, pointer)
					}
					p, err := s.Pointers()
					got := map[string]string{"current": p.Current, "previous": p.Previous}[pointer]
					if to := strings.Repeat(row.pointer, 64); err != nil || strings.TrimPrefix(got, "sets/") != to {
						t.Errorf("Pointers = %+v, %v; want %s to lead to %q", p, err, pointer, to)
					}
					if _, err := s.Current(); err != nil {
						t.Errorf("Current: %v", err)
					}
					if err := errors.Join(s.Recover(), s.Switch(digest("2")), s.Switch(digest("1")), s.Switch(digest("2")),
						s.Sweep()); err != nil {
						t.Fatal(err)
					}
					if diff := cmp.Diff(map[string]string{"bin": "2", "lib64": "2"}, who(t, s)); diff != "" {
						t.Errorf("after the switch (-want +got):\n%s", diff)
					}
					if got := s.NotLinks(); len(got) > 0 {
						t.Errorf("after the switch, NotLinks = %q; want none", got)
					}
					want = append(want, pointer+map[int]string{1: "-2"}[i])
					if after, err := os.Stat(s.Path("adopted/" + want[i])); err != nil || !os.SameFile(before, after) {
						t.Errorf("what was there: %v; want it as adopted/%s", err, want[i])
					}
				}
				if err := errors.Join(os.Remove(s.Path(pointer)), row.put(s.Path(pointer)),
					s.Restore(install.Pointers{})); err != nil {
					t.Errorf("Restore to nothing: %v", err)
				}
				want = append(want, pointer+"-3")
				for _, name := range want {
					if _, err := os.Stat(s.Path("adopted/" + name)); err != nil {
						t.Errorf("what was there: %v", err)
					}
				}
				if diff := cmp.Diff(map[string]string{}, who(t, s)); diff != "" {
					t.Errorf("after Restore to nothing (-want +got):\n%s", diff)
				}
				if err := errors.Join(row.put(s.Path(pointer)), s.Remove()); err != nil {
					t.Errorf("Remove: %v", err)
				}
			})
		}
	}
}
