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
)

// TestOnePointer puts several things in place of the pointers. All readers must agree on which sets are the current and
// the previous one.
func TestOnePointer(t *testing.T) {
	t.Parallel()
	folder := func(setJSON string) func(at string) error {
		return func(at string) error {
			return errors.Join(os.Mkdir(at, 0o755), os.WriteFile(filepath.Join(at, "set.json"), []byte(setJSON), 0o644))
		}
	}
	link := func(to string) func(at string) error {
		return func(at string) error { return os.Symlink(to, at) }
	}
	hex := func(c string) string { return strings.Repeat(c, 64) }
	for name, row := range map[string]struct {
		put  func(at string) error
		want string // the digit of the set
	}{
		"a link":                         {link("sets/" + hex("1")), "1"},
		"a link to a set that is gone":   {link("sets/" + hex("9")), ""},
		"a link to no set":               {link("sets"), ""},
		"an absolute link":               {link("/nvidia/.prebake/sets/" + hex("2")), "2"},
		"a link to itself":               {link("current"), ""},
		"a copy":                         {folder(fmt.Sprintf(`{"digest":%q}`, digest("2"))), "2"},
		"a copy with another content":    {folder(fmt.Sprintf(`{"digest":%q,"repository":"x"}`, digest("2"))), "2"},
		"a copy of a set that is gone":   {folder(fmt.Sprintf(`{"digest":%q}`, digest("9"))), ""},
		"a damaged copy":                 {folder("{"), ""},
		"a copy with a digest of no set": {folder(`{"digest":"sha256:../x"}`), ""},
		"a file":                         {func(at string) error { return os.WriteFile(at, nil, 0o644) }, ""},
		"nothing":                        {func(string) error { return nil }, ""},
	} {
		for _, pointer := range []string{"current", "previous"} {
			t.Run(name+" as "+pointer, func(t *testing.T) {
				t.Parallel()
				s := open(t)
				for _, c := range []string{"1", "2"} {
					add(t, s, c, "bin")
				}
				if err := errors.Join(s.Switch(digest("1")), s.Switch(digest("2"))); err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(os.Remove(s.Path(pointer)), row.put(s.Path(pointer))); err != nil {
					t.Fatal(err)
				}
				p, err := s.Pointers()
				read, to := s.Current, p.Current
				if pointer == "previous" {
					read, to = s.Previous, p.Previous
				}
				set, serr := read()
				if err := errors.Join(err, serr); err != nil {
					t.Fatal(err)
				}
				if row.want == "" {
					if set != nil || to != "" {
						t.Errorf("it leads to %q, and to the set %+v; want none", to, set)
					}
					return
				}
				whole, err := s.Set(digest(row.want))
				if err != nil || to != "sets/"+hex(row.want) {
					t.Errorf("it leads to %q, %v; want set %s", to, err, row.want)
				}
				if diff := cmp.Diff(whole, set); diff != "" {
					t.Errorf("the set of the pointer (-want +got):\n%s", diff)
				}
			})
		}
	}
}

// TestRecoverKeepsUsedFiles puts a copy of the active set in place of the link current, and removes the set itself.
// Programs use the files of the copy, so neither Recover nor Restore after a Switch may hide them.
func TestRecoverKeepsUsedFiles(t *testing.T) {
	t.Parallel()
	s := open(t)
	set := add(t, s, "1", "bin", "lib64")
	if err := s.Switch(set.Digest); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"bin": "1", "lib64": "1"}
	at := s.Path("current")
	if err := errors.Join(os.Remove(at), os.CopyFS(at, os.DirFS(s.Path("layers/"+strings.Repeat("1", 64)))),
		os.RemoveAll(s.Path("sets/"+strings.Repeat("1", 64)))); err != nil {
		t.Fatal(err)
	}
	if err := s.Recover(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, who(t, s)); diff != "" {
		t.Errorf("after Recover (-want +got):\n%s", diff)
	}
	// A failed activation restores the former state, before Switch or after it.
	before, err := s.Pointers()
	if err != nil {
		t.Fatal(err)
	}
	for i, switches := range []bool{false, true, false, true} {
		if switches {
			if err := s.Switch(add(t, s, "2", "bin", "share").Digest); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(map[string]string{"bin": "2", "share": "2"}, who(t, s)); diff != "" {
				t.Errorf("%d: after Switch (-want +got):\n%s", i, diff)
			}
		}
		if err := s.Restore(before); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, who(t, s)); diff != "" {
			t.Errorf("%d: after Restore (-want +got):\n%s", i, diff)
		}
	}
	if left, err := os.ReadDir(s.Path("adopted")); err != nil || len(left) > 0 {
		t.Errorf("adopted has %v, %v; want nothing left", left, err)
	}
	if err := s.Restore(install.Pointers{}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{}, who(t, s)); diff != "" {
		t.Errorf("after Restore to nothing (-want +got):\n%s", diff)
	}
}

// TestAside checks that the caller learns where something in place of a pointer was moved, and can remove it, but not
// what belongs to another installer.
func TestAside(t *testing.T) {
	t.Parallel()
	s := open(t)
	var moved []string
	s.PutAside = func(path string) { moved = append(moved, path) }
	for _, name := range []string{"current-x", "mycurrent", "previous.old"} {
		if err := os.Mkdir(s.Path("adopted/"+name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	add(t, s, "1", "bin")
	var want []string
	for _, name := range []string{"current", "current-2"} {
		if err := errors.Join(os.RemoveAll(s.Path("current")), os.MkdirAll(s.Path("current/x"), 0o755),
			s.Switch(digest("1"))); err != nil {
			t.Fatal(err)
		}
		want = append(want, "/nvidia/.prebake/adopted/"+name)
	}
	if err := errors.Join(os.WriteFile(s.Path("previous"), nil, 0o644), s.Restore(install.Pointers{})); err != nil {
		t.Fatal(err)
	}
	want = append(want, "/nvidia/.prebake/adopted/previous")
	if diff := cmp.Diff(want, moved); diff != "" {
		t.Errorf("moved (-want +got):\n%s", diff)
	}
	got, err := s.Aside()
	if diff := cmp.Diff([]string{"current", "current-2", "previous"}, got); diff != "" || err != nil {
		t.Errorf("Aside: %v (-want +got):\n%s", err, diff)
	}
	if err := s.RemoveAside(got); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(s.Path("adopted"))
	if err != nil || len(left) != 3 {
		t.Errorf("adopted has %v, %v; want what is not this program's", left, err)
	}
}

// TestReserved checks that a file with reserved space is replaced as a whole, also if no new file can be written.
func TestReserved(t *testing.T) {
	t.Parallel()
	s := open(t)
	const name, size = ".prebake/records.json", 4096
	read := func() string {
		raw, err := s.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimRight(string(raw), " ")
	}
	for range 2 {
		if err := s.Reserve(name, []byte("{}\n"), size); err != nil || read() != "{}\n" {
			t.Fatalf("Reserve = %v; the file has %q", err, read())
		}
	}
	if err := os.Mkdir(s.Path("tmp-file"), 0o755); err != nil { // WriteFile writes each file first under this name
		t.Fatal(err)
	}
	for i := range 5 {
		text := strings.Repeat("x", 1+i*1000) + "\n"
		if err := s.WriteReserved(name, []byte(text), size); err != nil || read() != text {
			t.Errorf("WriteReserved %d = %v; the file has %d bytes", i, err, len(read()))
		}
	}
	before := read()
	if err := s.WriteReserved(name, make([]byte, size+1), size); err == nil || read() != before {
		t.Errorf("WriteReserved of too much = %v; want an error, and the former content", err)
	}
}
