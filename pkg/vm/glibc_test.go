package vm

import (
	"bytes"
	"debug/elf"
	"os"
	"path"
	"slices"
	"testing"
)

func TestGlibcFiles(t *testing.T) {
	t.Parallel()
	const program = "/bin/sh"
	if d, err := readDynamicFile(program); err != nil {
		t.Fatal(err)
	} else if d.interpreter == "" {
		t.Skipf("%s is a static program here: the test needs one that loads glibc", program)
	}
	files, err := GlibcFiles(program, program)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		names = append(names, path.Base(f.Name))
		if _, err := os.Stat(f.Path); err != nil || !path.IsAbs(f.Name) {
			t.Errorf("file %+v: %v", f, err)
		}
	}
	for _, want := range []string{"ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libm.so.6"} {
		if !slices.Contains(names, want) {
			t.Errorf("GlibcFiles() = %v; want %s among them", names, want)
		}
	}
	slices.Sort(names)
	if len(slices.Compact(slices.Clone(names))) != len(names) {
		t.Errorf("GlibcFiles() = %v; want each once", names)
	}
}

func TestGlibcFilesRefusesText(t *testing.T) {
	t.Parallel()
	if _, err := GlibcFiles("glibc_test.go"); err == nil {
		t.Error("GlibcFiles() of a text file = nil; want an error")
	}
	if _, err := findLibrary(elf.EM_X86_64, "../lib.so"); err == nil {
		t.Error("findLibrary() took a path; want an error")
	}
}

func FuzzReadDynamic(f *testing.F) {
	f.Add([]byte("\x7fELF\x02\x01\x01"))
	if self, err := os.ReadFile("/bin/true"); err == nil && len(self) < 1<<17 {
		f.Add(self)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) > 1<<17 {
			return
		}
		d, err := readDynamic(bytes.NewReader(text))
		if err == nil && d.interpreter != "" && !path.IsAbs(d.interpreter) {
			t.Errorf("loader = %q; want an absolute path", d.interpreter)
		}
	})
}
