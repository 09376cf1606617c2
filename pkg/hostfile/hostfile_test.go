package hostfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/pkg/hostfile"
)

const sum = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824" // SHA-256 of "hello"

func TestCopy(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	text, program := filepath.Join(dir, "text"), filepath.Join(dir, "program")
	for path, mode := range map[string]fs.FileMode{text: 0o600, program: 0o700} {
		if err := os.WriteFile(path, []byte("hello"), mode); err != nil {
			t.Fatal(err)
		}
	}
	with := func(to, from string) error {
		got, err := hostfile.CopySum(to, from)
		if err == nil && got != sum {
			t.Errorf("CopySum(%s) = %s; want %s", from, got, sum)
		}
		return err
	}
	for _, row := range []struct {
		name string
		copy func(to, from string) error
		from string
		exec bool
	}{{"text", hostfile.Copy, text, false}, {"program", hostfile.Copy, program, true}, {"summed", with, program, false}} {
		to := filepath.Join(dir, "copy of "+row.name)
		if err := row.copy(to, row.from); err != nil {
			t.Errorf("%s: %v", row.name, err)
			continue
		}
		info, err := os.Stat(to)
		if err != nil || (info.Mode()&0o100 != 0) != row.exec {
			t.Errorf("%s: %v, %v; want executable %t", row.name, info, err, row.exec)
		}
		if got, err := hostfile.Sum(to); err != nil || got != sum {
			t.Errorf("%s: Sum = %s, %v; want %s", row.name, got, err, sum)
		}
		if err := row.copy(to, row.from); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s: copy over an existing file = %v; want %v", row.name, err, fs.ErrExist)
		}
		if err := row.copy(to+" of nothing", filepath.Join(dir, "nothing")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: copy of a missing file = %v; want %v", row.name, err, fs.ErrNotExist)
		}
		if _, err := os.Lstat(to + " of nothing"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the copy of a missing file exists: %v", row.name, err)
		}
	}
	if _, err := hostfile.Sum(dir); err == nil {
		t.Error("Sum of a folder is no error")
	}
}

// TestCopyFails checks that a copy that could not be completed returns an error and no checksum.
func TestCopyFails(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := hostfile.Copy(filepath.Join(dir, "a"), dir); err == nil {
		t.Error("Copy of a folder is no error")
	}
	if got, err := hostfile.CopySum(filepath.Join(dir, "b"), dir); err == nil || got != "" {
		t.Errorf("CopySum of a folder = %q, %v; want no sum and an error", got, err)
	}
}
