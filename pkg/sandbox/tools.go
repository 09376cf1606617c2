package sandbox

import (
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// hostTools are the programs in the host's /usr that a build runs: those in the kernel's
// Documentation/process/changes.rst that a module needs, and those that shell scripts use.
var hostTools = []string{
	"awk", "basename", "bash", "bc", "cat", "chmod", "cksum", "cmp", "cp", "cut", "date", "diff", "dirname", "echo", "env",
	"expr", "false",
	"find", "flock", "getconf", "gawk", "grep", "gzip", "head", "ln", "ls", "make", "mawk", "mkdir", "mktemp", "mv",
	"nproc", "pahole", "perl",
	"printf", "prlimit", "python3", "readlink", "realpath", "rm", "sed", "seq", "sh", "sort", "stat", "tail", "tee",
	"test", "touch", "tr",
	"true", "truncate", "uname", "uniq", "wc", "xargs", "xz", "zstd",
}

// HostTools returns a digest of the programs of the host that run in a build, with their loader and C library. It reads
// the files again each time, about 25 MB, because the host may be updated while a builder runs.
func HostTools() (string, error) { return digestTools("/usr/bin", hostTools) }

// digestTools returns a digest of programs in a folder. The digest also covers which programs are missing.
func digestTools(dir string, names []string) (string, error) {
	h := sha256.New()
	libraries := map[string]bool{}
	folders, err := libraryFolders()
	if err != nil {
		return "", fmt.Errorf("find the folders of this machine's libraries: %w", err)
	}
	for _, name := range names {
		file, err := filepath.EvalSymlinks(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			fmt.Fprintf(h, "%s missing\n", name)
			continue
		} else if err != nil {
			return "", fmt.Errorf("compute the digest of this machine's build tools: %w", err)
		}
		sum, err := digestFile(file)
		if err != nil {
			return "", fmt.Errorf("compute the digest of this machine's build tools: %w", err)
		}
		fmt.Fprintf(h, "%s %s\n", name, sum)
		needed, err := neededFiles(file, folders)
		if err != nil {
			return "", fmt.Errorf("find the libraries of this machine's build tool %s: %w", name, err)
		}
		for _, library := range needed {
			libraries[library] = true
		}
	}
	var all []string
	for library := range libraries {
		all = append(all, library)
	}
	slices.Sort(all)
	for _, library := range all {
		sum, err := digestFile(library)
		if err != nil {
			return "", fmt.Errorf("compute the digest of this machine's build tools: %w", err)
		}
		fmt.Fprintf(h, "%s %s\n", filepath.Base(library), sum)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// libraryFolders returns the folders where the loader of Debian and similar distributions searches, in groups: if one
// group has a library, the next is not searched.
func libraryFolders() (groups [][]string, err error) {
	for _, pattern := range []string{"/lib/*-linux-gnu", "/usr/lib/*-linux-gnu"} {
		folders, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		groups = append(groups, folders)
	}
	return append(groups, []string{"/lib64"}, []string{"/usr/lib64"}, []string{"/lib"}, []string{"/usr/lib"}), nil
}

// present returns the paths of a name in those folders that have it.
func present(folders []string, name string) (paths []string) {
	for _, folder := range folders {
		path := filepath.Join(folder, name)
		if _, err := os.Lstat(path); err == nil {
			paths = append(paths, path)
		}
	}
	return paths
}

// neededFiles returns the files of a program's loader and libraries, or none for a script. It searches the folders for
// libraries. It leaves out the libraries' own dependencies: they are the C library, or come in the same package.
func neededFiles(file string, folders [][]string) (found []string, err error) {
	f, err := elf.Open(file)
	var format *elf.FormatError
	if errors.As(err, &format) || errors.Is(err, io.EOF) {
		return nil, nil // a script
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			loader, err := io.ReadAll(io.LimitReader(p.Open(), maxLoader))
			if err != nil {
				return nil, err
			}
			found = append(found, strings.TrimRight(string(loader), "\x00"))
		}
	}
	for _, name := range names {
		for _, group := range folders {
			paths := present(group, filepath.Base(name))
			if len(paths) > 0 {
				found = append(found, paths...)
				break
			}
		}
	}
	return found, nil
}

// maxLoader is the maximum length of a loader's path in bytes.
const maxLoader = 4096

func digestFile(name string) (sum string, err error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close() // the file was only read
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("compute the digest of %s: %w", name, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
