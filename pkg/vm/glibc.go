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

// libraryFolders are the folders in which a glibc loader searches without a cache or configuration, on the
// distributions that Prebake builds on. The last folder for arm64 is an exception. No loader searches it, but Debian's
// cross compiler has its libraries there.
var libraryFolders = map[elf.Machine][]string{
	elf.EM_X86_64: {"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"},
	elf.EM_AARCH64: {"/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib",
		"/usr/aarch64-linux-gnu/lib"},
}

// guestFolders are the guest's folders for all libraries, which the guest's loader searches.
var guestFolders = map[elf.Machine]string{elf.EM_X86_64: "/lib/x86_64-linux-gnu",
	elf.EM_AARCH64: "/lib/aarch64-linux-gnu"}

// dlopenLibraries are parts of glibc that NVIDIA's libraries need. A program that opens NVIDIA's libraries with dlopen
// may not be linked with them.
var dlopenLibraries = []string{"libdl.so.2", "libpthread.so.0", "librt.so.1", "libm.so.6"}

// GlibcFiles returns the files that dynamic programs need in a guest of their own architecture: the loader, all needed
// libraries, and the parts of glibc for NVIDIA's libraries. The programs themselves are not in the result. Run paths
// (DT_RPATH, DT_RUNPATH) are ignored.
func GlibcFiles(paths ...string) ([]File, error) {
	found := map[string]bool{}
	var files []File
	var queue []string
	var machine elf.Machine
	for _, p := range paths {
		d, err := readDynamicFile(p)
		if err != nil {
			return nil, fmt.Errorf("find libraries of %s: %w", p, err)
		}
		if machine != elf.EM_NONE && d.machine != machine {
			return nil, fault.New(fault.Usage,
				fmt.Sprintf("find libraries of %s: the file is for %v, but the other files are for %v", p, d.machine, machine), "")
		}
		machine = d.machine
		if name := path.Base(d.interpreter); d.interpreter != "" && !found[name] {
			found[name] = true
			host, err := findLibrary(machine, name)
			if err != nil {
				return nil, err
			}
			files = append(files, File{Name: d.interpreter, Path: host, Mode: 0o755})
		}
		queue = append(queue, d.needed...)
	}
	if len(queue) == 0 {
		return nil, nil // static programs need no libraries
	}
	queue = append(queue, dlopenLibraries...)
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		if found[name] {
			continue
		}
		found[name] = true
		host, err := findLibrary(machine, name)
		if err != nil {
			return nil, err
		}
		files = append(files, File{Name: path.Join(guestFolders[machine], name), Path: host, Mode: 0o755})
		d, err := readDynamicFile(host)
		if err != nil {
			return nil, fmt.Errorf("find libraries of %s: %w", host, err)
		}
		queue = append(queue, d.needed...)
	}
	return files, nil
}

func findLibrary(machine elf.Machine, name string) (string, error) {
	if strings.ContainsRune(name, '/') {
		return "", fmt.Errorf("find library %q: want a name without a folder", name)
	}
	for _, dir := range libraryFolders[machine] {
		p := path.Join(dir, name)
		f, err := elf.Open(p)
		if err != nil {
			continue
		}
		found := f.Machine
		if f.Close() == nil && found == machine {
			return p, nil
		}
	}
	hint := "install the package that contains this library"
	if machine == elf.EM_AARCH64 {
		hint = "install Debian's package libc6-dev-arm64-cross"
	}
	return "", fault.New(fault.Usage,
		fmt.Sprintf("find library %s for %v: the library is not in %s", name, machine, strings.Join(libraryFolders[machine],
			", ")), hint)
}

// maxInterpreter is the maximum length of a loader's path in bytes.
const maxInterpreter = 4096

// dynamic has the loader and the libraries that a program or library needs.
type dynamic struct {
	machine     elf.Machine
	interpreter string
	needed      []string
}

func readDynamicFile(file string) (d dynamic, err error) {
	in, err := os.Open(file)
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	return readDynamic(in)
}

func readDynamic(r io.ReaderAt) (d dynamic, err error) {
	f, err := elf.NewFile(r)
	if err != nil {
		return d, err
	}
	d.machine = f.Machine
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		if p.Filesz > maxInterpreter {
			return d, fmt.Errorf("the path of the loader is too long: %d bytes", p.Filesz)
		}
		text := make([]byte, p.Filesz)
		if _, err := p.ReadAt(text, 0); err != nil {
			return d, fmt.Errorf("read the path of the loader: %w", err)
		}
		d.interpreter = strings.TrimRight(string(text), "\x00")
		if !path.IsAbs(d.interpreter) || path.Clean(d.interpreter) != d.interpreter {
			return d, fmt.Errorf("path of the loader %q: want a clean absolute path", d.interpreter)
		}
	}
	d.needed, err = f.ImportedLibraries()
	return d, err
}
