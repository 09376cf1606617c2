package vm

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// libraryFolders are where a glibc loader without a cache or configuration
// looks on the distributions that Prebake builds on.
var libraryFolders = []string{
	"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib",
}

// dlopened are glibc's parts that NVIDIA's libraries need, though the program
// that opens them by name may not.
var dlopened = []string{"libdl.so.2", "libpthread.so.0", "librt.so.1", "libm.so.6"}

// GlibcFiles returns what dynamic programs and libraries of this host need in
// a guest: the loader, every library they name, those that these name, and
// glibc's parts that NVIDIA's libraries name. Each keeps its host path. The
// programs themselves are not among them. Run paths are not followed.
func GlibcFiles(paths ...string) ([]File, error) {
	found := map[string]string{} // name -> path
	var files []File
	add := func(host string) {
		files = append(files, File{Name: host, Path: host, Mode: 0o755})
	}
	var queue []string
	for _, p := range paths {
		interpreter, needed, err := dynamic(p)
		if err != nil {
			return nil, fmt.Errorf("find libraries of %s: %w", p, err)
		}
		if interpreter != "" && found[path.Base(interpreter)] == "" {
			found[path.Base(interpreter)] = interpreter
			add(interpreter)
		}
		queue = append(queue, needed...)
	}
	if len(queue) == 0 {
		return nil, nil // static: needs nothing
	}
	queue = append(queue, dlopened...)
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		if found[name] != "" {
			continue
		}
		host, err := findLibrary(name)
		if err != nil {
			return nil, err
		}
		found[name] = host
		add(host)
		_, needed, err := dynamic(host)
		if err != nil {
			return nil, fmt.Errorf("find libraries of %s: %w", host, err)
		}
		queue = append(queue, needed...)
	}
	return files, nil
}

func findLibrary(name string) (string, error) {
	if strings.ContainsRune(name, '/') {
		return "", fmt.Errorf("library %q: want a name without a folder", name)
	}
	for _, dir := range libraryFolders {
		p := path.Join(dir, name)
		f, err := elf.Open(p)
		if err != nil {
			continue
		}
		machine := f.Machine
		if f.Close() == nil && machine == elf.EM_X86_64 {
			return p, nil
		}
	}
	return "", fault.New(fault.Usage, fmt.Sprintf("find library %s: not in %s", name, strings.Join(libraryFolders, ", ")),
		"install the package that has it")
}

// maxInterpreter bounds the path of a loader.
const maxInterpreter = 4096

// dynamic reads a program's loader and the libraries that it names.
func dynamic(file string) (interpreter string, needed []string, err error) {
	in, err := os.Open(file)
	if err != nil {
		return "", nil, err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	return readDynamic(in)
}

func readDynamic(r io.ReaderAt) (interpreter string, needed []string, err error) {
	f, err := elf.NewFile(r)
	if err != nil {
		return "", nil, err
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		if p.Filesz > maxInterpreter {
			return "", nil, fmt.Errorf("loader's path of %d bytes", p.Filesz)
		}
		text := make([]byte, p.Filesz)
		if _, err := p.ReadAt(text, 0); err != nil {
			return "", nil, fmt.Errorf("read loader's path: %w", err)
		}
		interpreter = strings.TrimRight(string(text), "\x00")
		if !path.IsAbs(interpreter) || path.Clean(interpreter) != interpreter {
			return "", nil, fmt.Errorf("loader %q: want a clean absolute path", interpreter)
		}
	}
	needed, err = f.ImportedLibraries()
	return interpreter, needed, err
}
