package modcheck

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/installed"
)

// TestUnstamped stamps files of the compiler, the linker and strip. Unstamped must return the bytes from before the
// stamp.
func TestUnstamped(t *testing.T) {
	t.Parallel()
	check := func(t *testing.T, name string, plain []byte) {
		t.Helper()
		got, err := Unstamped(stampFile(t, plain, ours))
		if err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%s: Unstamped(Stamp(module)) = %d bytes, %v; want the %d bytes that were stamped", name, len(got), err,
				len(plain))
		}
	}
	for extra := range stampAlign { // one row for each possible padding before the stamp
		check(t, fmt.Sprintf("padding %d", extra), module(magic+string(bytes.Repeat([]byte{'x'}, extra))))
	}
	t.Run("compiled", func(t *testing.T) {
		t.Parallel()
		installed.Programs(t, "gcc", "ld", "strip")
		dir := t.TempDir()
		write(t, filepath.Join(dir, "a.c"), []byte("int a; int main(void) { return a; }\n"))
		for _, row := range []struct{ made, tool, args string }{
			{"a.o", "gcc", "-c a.c -o a.o"}, {"linked.ko", "ld", "-r -o linked.ko a.o"},
			{"stripped.ko", "strip", "-g -o stripped.ko linked.ko"},
		} {
			cmd := exec.CommandContext(t.Context(), row.tool, strings.Fields(row.args)...)
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%s %s: %v\n%s", row.tool, row.args, err, out)
			}
			data, err := os.ReadFile(filepath.Join(dir, row.made))
			if err != nil {
				t.Fatal(err)
			}
			check(t, row.made, data)
		}
	})
	path := filepath.Join(t.TempDir(), "x")
	for name, data := range map[string][]byte{"not stamped": module(magic), "no ELF file": []byte("x"),
		"more behind the stamp": append(stampedModule(t), 0)} {
		write(t, path, data)
		if got, err := Unstamped(path); err == nil {
			t.Errorf("%s: Unstamped = %d bytes; want an error", name, len(got))
		}
	}
}

func stampedModule(t testing.TB) []byte {
	t.Helper()
	data, err := addStamp(module(magic), ours)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func FuzzUnstamped(f *testing.F) {
	f.Add(stampedModule(f))
	f.Add(module(magic))
	f.Fuzz(func(t *testing.T, data []byte) {
		plain, err := removeStamp(data)
		if err != nil {
			return
		}
		if len(plain) >= len(data) {
			t.Errorf("removeStamp() took nothing off %d bytes", len(data))
		}
	})
}
